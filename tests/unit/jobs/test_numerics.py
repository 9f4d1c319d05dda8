from __future__ import annotations

import pytest

from coordinator.jobs.planning import make_numerics
from plutino.families import FAMILIES, family_of
from tests.unit.jobs.test_eligibility import LAPTOP
from tests.unit.scheduling.test_scheduler import plan_of


@pytest.mark.parametrize("model_type", FAMILIES)
def test_numerics_record_names_the_attention_backend_of_the_family(model_type):
    record = make_numerics(plan_of({LAPTOP.agent_id: 1}), family_of(model_type), [LAPTOP])

    assert record.attention == ("eager" if model_type in ("gemma2", "bloom") else "sdpa")
