"""A fleet file's devices as processes on this machine: what its links may be, they are at the most."""

from __future__ import annotations

import os

import pytest

from benchmarks.tcp_sockets import listing_refusal
from benchmarks.testbed import LocalFleet
from partitioner.fleet_file import FleetFile

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.slow,
    pytest.mark.skipif(listing_refusal() is not None, reason=f"{listing_refusal()}"),
]

RATE_BYTES_PER_S = 20e6 / 8
LATENCY_S = 0.005


def test_agents_measure_no_more_than_the_links_of_their_fleet_file(tmp_path):
    device = {"name": "board", "memory": "1GiB", "flops": 1e10, "threads": 1, "count": 2}
    fleet = FleetFile.model_validate({"devices": [device], "rate": "20Mbit", "latency_ms": 1e3 * LATENCY_S})

    with LocalFleet(fleet, tmp_path, cores=sorted(os.sched_getaffinity(0))) as bed:
        links, notes = bed.links(), bed.notes
        assert {row["name"] for row in bed.stack.client.devices()} == {"board-1", "board-2"}

    assert links or any("not measured in time" in note for note in notes)
    for rate, latency_s in links.values():
        assert rate <= 1.05 * RATE_BYTES_PER_S
        assert latency_s >= LATENCY_S
