"""Leases over real gRPC: devices that stall, and devices that never come back."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from coordinator.fleet.registry import Patience
from tests.integration.stack import People, ThreadAgent, ThreadCoordinator, wait_until


def test_device_that_stalled_for_longer_than_its_lease_is_in_again_when_it_speaks(tmp_path: Path) -> None:
    """A laptop that slept: its stream stayed up, and a gone device comes back only with a new hello."""
    with ExitStack() as stack:
        coordinator = ThreadCoordinator(tmp_path, patience=Patience(lease_s=0.5, settle_s=0.0))
        stack.callback(coordinator.close)
        people = People(coordinator.endpoints.people_address)
        stack.callback(people.close)
        agent = ThreadAgent(coordinator.endpoints.devices_address, "sleeper")
        stack.callback(agent.close)
        wait_until(lambda: [d["state"] for d in people.devices()] == ["alive"], "attached")
        first_stream = agent.num_streams

        agent.stall()
        wait_until(lambda: agent.num_streams > first_stream, "its stream was ended")
        agent.wake_up()

        wait_until(lambda: [d["state"] for d in people.devices()] == ["alive"], "in again")
