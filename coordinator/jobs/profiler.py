"""Devices' measured seconds, asked for once for each model, shape, device and company."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest

from coordinator.fleet.agent_link import ProfileAnswer
from coordinator.fleet.cores import shared_cores
from coordinator.fleet.membership import Device
from coordinator.fleet.registry import FleetRegistry
from coordinator.jobs.host_meeting import PATIENCE_S, HostMeeting
from partitioner.device import BlockTimings, ProfileRequest
from plutino.errors import AgentError
from plutino.types import AgentId

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Asked:
    """A device and what it shall measure."""

    device: Device
    request: ProfileRequest

    @property
    def agent_id(self) -> AgentId:
        """The device's."""
        return self.device.agent_id

    @property
    def key(self) -> tuple[AgentId, str]:
        """Same device, same measurement."""
        return self.agent_id, self.request.model_dump_json()

    def beside(self, others: Sequence[Asked]) -> Asked:
        """The same with those who measure meanwhile."""
        threads = sorted(other.request.threads for other in others if other.agent_id != self.agent_id)
        return Asked(self.device, self.request.model_copy(update={"beside": tuple(threads)}))


@dataclass(frozen=True, slots=True)
class Seconds:
    """What a device measured."""

    timings: BlockTimings
    remark: str = ""
    """Why a job may find it slower; empty: it measured as jobs will run."""


Found = dict[AgentId, Seconds | AgentError]


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

    async def measure(self, asked: Sequence[Asked]) -> list[Seconds | AgentError]:
        """Seconds of devices, known until they are doubted; devices themselves keep them beyond this coordinator.

        Devices of one host that have their own cores measure while all of them compute, for so they will work: they
        share caches and memory bandwidth. On the same cores they measure one after the other, and twice, of which the
        faster counts. Otherwise a moment in which something else ran there would make one of two equal devices look
        slower, and the cut would be uneven for the whole job (a block of 69 ms measured as 88 ms moves a block of
        twelve).

        Returns:
            In the order of the devices what each measured, or why it could not.
        """
        hosts: dict[str, list[Asked]] = {}
        for one in asked:
            hosts.setdefault(one.device.host_id, []).append(one)
        found: Found = {}
        for of_host in await asyncio.gather(*(self._measure_host(*each) for each in hosts.items())):
            found |= of_host
        return [found[one.agent_id] for one in asked]

    # Private: who measures when.

    async def _measure_host(self, host_id: str, asked: Sequence[Asked]) -> Found:
        # One at a time: two jobs' measurements would slow each other, and wait for each other's devices.
        async with self._one_at_a_time.setdefault(host_id, asyncio.Lock()):
            turns = [[one for one in turn if one is not None] for turn in zip_longest(*self._places(asked))]
            found: Found = {}
            measured = [await self._first_turn(turn, found) for turn in turns]
            if len(turns) > 1:
                for turn in measured:
                    if all(isinstance(found[one.agent_id], Seconds) for one in turn):
                        await self._together(turn, found, attempt=1)
            return found

    def _places(self, asked: Sequence[Asked]) -> list[list[Asked]]:
        """The devices gathered by the cores that they share."""
        host_id = asked[0].device.host_id
        on_host = [device for device in self._fleet.devices if device.host_id == host_id]
        wanted = {one.agent_id: one.request.threads for one in asked}
        most = max(wanted.values())
        threads = {device.agent_id: wanted.get(device.agent_id, min(device.threads, most)) for device in on_host}
        cores = shared_cores(on_host, threads)
        places: dict[str, list[Asked]] = {}
        for one in asked:
            places.setdefault(cores.get(one.agent_id) or one.agent_id, []).append(one)
        return list(places.values())

    async def _first_turn(self, turn: Sequence[Asked], found: Found) -> list[Asked]:
        """Note what devices of different cores have kept of a measurement together, or let all of them measure.

        Returns:
            Those that measured.
        """
        while True:
            members = [one.beside(turn) for one in turn]
            answers = await asyncio.gather(*(self._kept(one) for one in members))
            kept = {one.agent_id: answer for one, answer in zip(members, answers, strict=True)}
            refused = {agent_id: answer for agent_id, answer in kept.items() if isinstance(answer, AgentError)}
            if not refused:
                break
            # A device that a job fills is in no plan beside these.
            found |= refused
            turn = [one for one in turn if one.agent_id not in refused]
        found |= {agent_id: Seconds(answer) for agent_id, answer in kept.items() if isinstance(answer, BlockTimings)}
        if all(one.agent_id in found for one in members):
            return []
        # Those who know their seconds compute as well: the others are to be measured beside them.
        await self._together(members, found, attempt=0)
        return members

    async def _kept(self, one: Asked) -> BlockTimings | AgentError | None:
        if one.agent_id in self._doubted:
            return None
        if (known := self._known.get(one.key)) is not None:
            return known
        try:
            kept = await self._fleet.kept_profile(one.agent_id, one.request)
        except AgentError as error:
            return error
        if kept is not None:
            self._known[one.key] = kept
        return kept

    async def _together(self, members: Sequence[Asked], found: Found, *, attempt: int) -> None:
        """Let devices measure at the same time; of what one has measured before, the faster counts, part by part."""
        if members:
            logger.info("measuring at the same time: %s", ", ".join(one.device.name for one in members))
        meeting = HostMeeting([one.agent_id for one in members])
        try:
            answers = await asyncio.gather(*(self._measure(one, meeting, found, attempt) for one in members))
        finally:
            meeting.close()
        for one, answer in zip(members, answers, strict=True):
            before = found.get(one.agent_id)
            if isinstance(answer, AgentError):
                found[one.agent_id] = answer
                continue
            timings = answer.timings.fastest(before.timings) if isinstance(before, Seconds) else answer.timings
            if answer.lacked_company:
                lost = [
                    f"{other.device.name}, which {_lost(said)}"
                    for other, said in zip(members, answers, strict=True)
                    if other is not one and (isinstance(said, AgentError) or other.agent_id in meeting.late)
                ]
                found[one.agent_id] = Seconds(timings, _remark(lost))
                logger.warning("%s: %s", one.device.name, _remark(lost))
            else:
                self._known[one.key] = timings
                found[one.agent_id] = Seconds(timings)

    async def _measure(
        self, one: Asked, meeting: HostMeeting, found: Found, attempt: int
    ) -> ProfileAnswer | AgentError:
        is_known = one.agent_id in found
        is_doubted = one.agent_id in self._doubted
        turn = {"attempt": max(attempt, int(is_known)), "is_fresh": is_known or is_doubted or attempt > 0}
        try:
            answer = await self._fleet.profile(
                one.agent_id, one.request.model_copy(update=turn), partial(meeting.reach, one.agent_id)
            )
        except AgentError as error:
            return error
        finally:
            meeting.leave(one.agent_id)
        self._doubted.discard(one.agent_id)
        return answer


def _lost(answer: ProfileAnswer | AgentError) -> str:
    if isinstance(answer, AgentError):
        return f"did not measure ({answer})"
    return f"was more than {PATIENCE_S:.0f} s later"


def _remark(lost: Sequence[str]) -> str:
    who = "; ".join(lost) or "all that were asked: the coordinator was not heard in time"
    return (
        f"measured without {who}. Devices of one host slow each other, so that steps may take longer than planned; the "
        "next plan measures anew"
    )
