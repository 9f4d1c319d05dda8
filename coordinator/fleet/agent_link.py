"""One attached agent: what waits to be sent to it, and the answers that somebody waits for."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from coordinator.fleet.membership import Device
from partitioner.device import BlockTimings
from plutino.doctor.burst import LinkFigures
from plutino.errors import AgentError, AgentLostError
from plutino.types import AgentId, WorkerRef
from plutino.wire.convert import worker_from_proto
from plutino.wire.hardware import hardware_from_proto
from protos import agents_pb2 as pb

logger = logging.getLogger(__name__)

OUTGOING_BOUND = 1024
"""Commands that may wait for one agent."""

_Answer = TypeVar("_Answer")


@dataclass(frozen=True, slots=True)
class ProfileAnswer:
    """A device's seconds for a request."""

    timings: BlockTimings
    is_kept: bool = False
    """It had measured them for an earlier request."""
    lacked_company: bool = False
    """Of the devices that the request says compute meanwhile some did not."""


OnMilestone = Callable[[int, Callable[[bool], None]], None]
"""Takes a milestone that a measurement has reached, and what lets it go on, told whether all others have reached it."""


@dataclass(slots=True)
class WorkerUsage:
    """What a worker last used, as its agent sees it."""

    rss_bytes: int
    peak_rss_bytes: int
    cpu_seconds: float


@dataclass(slots=True)
class AgentLink:
    """One attached agent."""

    agent_id: AgentId
    stream: int
    outgoing: asyncio.Queue[pb.AgentCommand | None]
    workers: set[WorkerRef]
    """Workers it runs, as far as it has said."""
    cache_address: str = ""
    """Where the other devices of its jobs reach its weights cache."""
    usage: dict[WorkerRef, WorkerUsage] = field(default_factory=dict)
    agent_rss_bytes: int = 0
    profiles: dict[str, asyncio.Future[ProfileAnswer | None]] = field(default_factory=dict)
    on_milestones: dict[str, OnMilestone] = field(default_factory=dict)
    """Who hears of the milestones of a request for a measurement."""
    doors: dict[str, asyncio.Future[str]] = field(default_factory=dict)
    knocks: dict[str, asyncio.Future[float]] = field(default_factory=dict)
    bursts: dict[str, asyncio.Future[LinkFigures]] = field(default_factory=dict)

    def send(self, command: pb.AgentCommand) -> bool:
        """Queue a command; False if so many wait that the agent cannot be reading: then the stream is ended."""
        if self.outgoing.full():
            logger.warning("%s has not read its last %d commands; its stream is ended", self.agent_id, OUTGOING_BOUND)
            self.end()
            return False
        self.outgoing.put_nowait(command)
        return True

    def note_usage(self, heartbeat: pb.Heartbeat) -> None:
        """Keep what the agent and its workers use now."""
        self.agent_rss_bytes = heartbeat.agent_rss_bytes
        for usage in heartbeat.workers:
            self.usage[worker_from_proto(usage.worker)] = WorkerUsage(
                usage.rss_bytes, usage.peak_rss_bytes, usage.cpu_seconds
            )

    def take_answer(self, event: pb.AgentEvent, name: str) -> None:
        """Hand an answer to whoever waits for it.

        Args:
            event: what the agent sent; anything but an answer is passed over.
            name: the device's name for people.
        """
        match event.WhichOneof("event"):
            case "profile_result":
                result = event.profile_result
                _settle(name, self.profiles.get(result.request_id), result.error, lambda: _timings(result))
            case "profile_reached":
                self._take_milestone(event.profile_reached)
            case "door_opened":
                door = event.door_opened
                _settle(name, self.doors.get(door.request_id), door.error, lambda: door.address)
            case "knocked":
                knocked = event.knocked
                if knocked.request_id in self.bursts:
                    _settle(name, self.bursts[knocked.request_id], knocked.error, lambda: _figures(knocked))
                else:
                    _settle(name, self.knocks.get(knocked.request_id), knocked.error, lambda: knocked.seconds)

    def _take_milestone(self, reached: pb.ProfileReached) -> None:
        request_id, milestone = reached.request_id, reached.milestone

        def go_on(is_whole: bool) -> None:
            word = pb.ProfileGoOn(request_id=request_id, milestone=milestone, is_whole=is_whole)
            self.send(pb.AgentCommand(profile_go_on=word))

        if (on_milestone := self.on_milestones.get(request_id)) is not None:
            on_milestone(milestone, go_on)
        else:
            # Nobody waits for its answer any more; it shall not wait for anybody either.
            go_on(False)

    def give_up_answers(self, name: str) -> None:
        """The stream is over: whoever waits for an answer hears that."""
        questions: list[dict[str, asyncio.Future[Any]]] = [self.profiles, self.doors, self.knocks, self.bursts]
        for answer in (answer for answers in questions for answer in answers.values()):
            if not answer.done():
                answer.set_exception(AgentLostError(f"{name} left before it answered"))

    def end(self) -> None:
        """End the stream after what waits to be sent; an agent that does not read it has lost all of that anyway."""
        if self.outgoing.full():
            self.outgoing.get_nowait()
        self.outgoing.put_nowait(None)


def _settle(name: str, answer: asyncio.Future[_Answer] | None, error: str, value: Callable[[], _Answer]) -> None:
    """Hand an agent's answer to whoever waits for it; nobody does any more once it has taken too long."""
    if answer is None or answer.done():
        return
    if error:
        answer.set_exception(AgentError(f"{name}: {error}"))
    else:
        answer.set_result(value())


def _timings(result: pb.ProfileResult) -> ProfileAnswer | None:
    if not result.timings_json:
        return None
    timings = BlockTimings.model_validate_json(result.timings_json)
    return ProfileAnswer(timings, is_kept=result.is_kept, lacked_company=result.lacked_company)


def _figures(knocked: pb.Knocked) -> LinkFigures:
    return LinkFigures(
        latency_s=knocked.latency_s,
        up_bytes_per_s=knocked.up_bytes_per_s,
        down_bytes_per_s=knocked.down_bytes_per_s,
    )


def device_of(hello: pb.AgentHello) -> Device:
    """A device as its hello tells of it."""
    return Device(
        agent_id=AgentId(hello.agent_id),
        name=hello.name,
        host_id=hello.host_id,
        memory_budget_bytes=hello.memory_budget_bytes,
        baseline_bytes=hello.baseline_bytes,
        threads=hello.threads,
        versions=dict(hello.versions),
        dtypes=tuple(hello.dtypes),
        slow_dtypes=dict(hello.slow_dtypes),
        hardware=hardware_from_proto(hello.hardware),
        measures_links=hello.measures_links,
        processors=tuple(hello.processors),
        processor_quota=hello.processor_quota or None,
    )
