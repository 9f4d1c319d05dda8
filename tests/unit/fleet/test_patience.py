from __future__ import annotations

import pytest

from coordinator.fleet.membership import Fleet
from coordinator.fleet.registry import Patience


@pytest.mark.parametrize("lease_s", [0.5, 1.0, 15.0, 600.0])
def test_patience_any_lease_outlives_many_lost_heartbeats_and_a_suspicion(lease_s):
    patience = Patience(lease_s=lease_s)

    assert patience.heartbeat_every_s <= 1.0
    assert 15 * patience.heartbeat_every_s <= lease_s
    Fleet(lease_s=lease_s, suspect_after_s=patience.suspect_after_s)
