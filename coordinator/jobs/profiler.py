"""Devices' measured seconds, asked for once for each model, shape and device."""

from __future__ import annotations

import asyncio

from coordinator.fleet.cores import shared_cores
from coordinator.fleet.membership import Device
from coordinator.fleet.registry import FleetRegistry
from partitioner.device import BlockTimings, ProfileRequest
from plutino.types import AgentId


class Profiler:
    """Measured seconds of devices."""

    def __init__(self, fleet: FleetRegistry) -> None:
        self._fleet = fleet
        self._known: dict[tuple[AgentId, str], BlockTimings] = {}
        self._one_at_a_time: dict[str, asyncio.Lock] = {}
        self._doubted: set[AgentId] = set()

    def doubt(self, agent_id: AgentId) -> None:
        """A device computes at another pace than it had measured: before the next plan it measures anew."""
        self._doubted.add(agent_id)
        for key in [key for key in self._known if key[0] == agent_id]:
            del self._known[key]

    async def timings(self, device: Device, request: ProfileRequest) -> BlockTimings:
        """Seconds on a device, known until they are doubted; the device itself keeps them beyond this coordinator.

        Devices of one host are measured at the same time if each has its own cores, for so they will work, and what
        else runs there slows them alike; on the same cores one after the other. And twice, of which the faster counts.
        Otherwise a moment in which something else ran there would make one of two equal devices look slower, and the
        cut would be uneven for the whole job (a block of 69 ms measured as 88 ms moves a block of twelve). What a
        device has kept was measured so already.

        Raises:
            AgentLostError: the device left.
            AgentError: the device could not be measured.
        """
        key = (device.agent_id, request.model_dump_json())
        beside = [other for other in self._fleet.devices if other.host_id == device.host_id]
        threads = {other.agent_id: min(other.threads, request.threads) for other in beside}
        place = shared_cores(beside, threads).get(device.agent_id) or device.agent_id
        found: BlockTimings | None = None
        for attempt in range(2 if len(beside) > 1 else 1):
            # The lock is fair: every device on the same cores has its first turn before any has its second.
            async with self._one_at_a_time.setdefault(place, asyncio.Lock()):
                if key in self._known:
                    return self._known[key]
                is_fresh = attempt > 0 or device.agent_id in self._doubted
                asked = request.model_copy(update={"attempt": attempt, "is_fresh": is_fresh})
                answer = await self._fleet.profile(device.agent_id, asked)
                self._doubted.discard(device.agent_id)
            found = answer.timings if found is None else found.fastest(answer.timings)
            if answer.is_kept:
                break
        assert found is not None
        return self._known.setdefault(key, found)
