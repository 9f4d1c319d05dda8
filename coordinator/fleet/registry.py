"""The agents' control streams: who is in, what each runs and uses, and how to tell it something.

The shell around :mod:`coordinator.fleet.membership`: it feeds the pure fleet with what happened and when, and tells
listeners what changed.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import TypeVar

from coordinator.fleet.agent_link import OUTGOING_BOUND, AgentLink, OnMilestone, ProfileAnswer, device_of
from coordinator.fleet.membership import Change, Device, DeviceState, Fleet
from partitioner.device import BlockTimings, ProfileRequest
from plutino.errors import AgentError, AgentLostError, SecurityError
from plutino.hardware import wire_refusal
from plutino.types import AgentId, WorkerRef
from plutino.wire.convert import worker_from_proto, worker_to_proto
from protos import agents_pb2 as pb

logger = logging.getLogger(__name__)

_PROFILE_TIMEOUT_S = 600.0
"""A block of an 8B model takes 30 s to draw, pack and run on one core, and a busy or small device many times that."""
_LOOK_AGAIN_S = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long the coordinator waits for devices."""

    lease_s: float = 15.0
    """A device that is silent for so long is gone, and its workers are lost."""
    settle_s: float = 1.5
    """A plan waits until no device has joined for so long."""
    return_s: float = 10.0
    """After a restart of the coordinator a device has so much more than its lease: it dials every second, but may first
    have to wait out a keepalive or a handshake."""

    @property
    def heartbeat_every_s(self) -> float:
        """How often agents speak up: a lease survives many lost words, and a short one makes them speak faster."""
        return min(1.0, self.lease_s / 15)

    @property
    def suspect_after_s(self) -> float:
        """Four heartbeats."""
        return 4 * self.heartbeat_every_s


_Answer = TypeVar("_Answer")


@dataclass(frozen=True, slots=True)
class WorkerExit:
    """An agent's word that a worker has ended."""

    ref: WorkerRef
    agent_id: AgentId
    exit_code: int
    reason: str
    is_out_of_memory: bool


class FleetRegistry:
    """All devices, and the way to those that are attached."""

    def __init__(
        self,
        *,
        incarnation: int,
        on_change: Callable[[Change], None],
        on_worker_exit: Callable[[WorkerExit], None],
        patience: Patience | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._incarnation = incarnation
        self._patience = patience or Patience()
        self._on_change = on_change
        self._on_worker_exit = on_worker_exit
        self._clock = clock
        self._streams = itertools.count(1)
        self._requests = itertools.count(1)
        self.fleet = Fleet(lease_s=self._patience.lease_s, suspect_after_s=self._patience.suspect_after_s)
        self._links: dict[AgentId, AgentLink] = {}
        self._last_join_s = clock()
        self.revoked_ids: set[str] = set()
        """Devices whose certificates have not ended yet and count no more."""

    @property
    def devices(self) -> tuple[Device, ...]:
        """Devices that are alive."""
        return self.fleet.in_state(DeviceState.ALIVE)

    async def settled(self) -> None:
        """Wait until a device is in and no other has joined for a moment.

        Agents that outlived the coordinator come back one after the other; a plan made over the first would be wrong.
        """
        settle_s = self._patience.settle_s
        while not self.devices or self._clock() - self._last_join_s < settle_s:
            await asyncio.sleep(max(_LOOK_AGAIN_S, settle_s / 10))

    async def settled_soon(self) -> None:
        """The same for a job that has begun: it does not wait for devices longer than one has to come back.

        Raises:
            AgentLostError: no device is in.
        """
        within_s = self._patience.lease_s + self._patience.return_s + self._patience.settle_s
        try:
            await asyncio.wait_for(self.settled(), within_s)
        except asyncio.TimeoutError:
            if not self.devices:
                raise AgentLostError(f"no device has attached for {within_s:.0f} s") from None

    def expect(self, agent_id: AgentId, name: str) -> None:
        """A device that runs workers for this coordinator's predecessor has its lease from now on."""
        self._step(self.fleet.expect(agent_id, name, self._clock(), grace_s=self._patience.return_s))

    def link(self, agent_id: AgentId) -> AgentLink | None:
        """The stream of an attached agent."""
        return self._links.get(agent_id)

    def name_of(self, agent_id: AgentId) -> str:
        """A device's name for people."""
        member = self.fleet.members.get(agent_id)
        return str(agent_id) if member is None else member.device.name

    def is_gone(self, agent_id: AgentId) -> bool:
        """The device's lease has run out, or it said goodbye."""
        member = self.fleet.members.get(agent_id)
        return member is not None and member.state.is_away

    @property
    def returning(self) -> tuple[AgentId, ...]:
        """Devices that said goodbye so lately that they may be on their way back: an update starts them again."""
        within_s = self._patience.lease_s + self._patience.return_s
        return tuple(
            agent_id
            for agent_id, member in self.fleet.members.items()
            if member.state is DeviceState.LEFT and self._clock() - member.last_heard_s < within_s
        )

    async def serve(
        self, events: AsyncIterator[pb.AgentEvent], certified_id: str | None = None
    ) -> AsyncIterator[pb.AgentCommand]:
        """One control stream of an agent, from its hello to its end.

        Raises:
            SecurityError: the agent's certificate is for another id than the one it gives.
        """
        first = await anext(events, None)
        if first is None or not first.HasField("hello"):
            return
        if certified_id is not None and first.hello.agent_id != certified_id:
            raise SecurityError(
                f"the certificate is for device {certified_id}, the agent says it is {first.hello.agent_id[:80]}"
            )
        refused = wire_refusal(first.hello.name, first.hello.wire_version)
        if refused is not None:
            logger.warning("refused: %s", refused)
            yield pb.AgentCommand(welcome=pb.AgentWelcome(incarnation=self._incarnation, refused=refused))
            return
        link = AgentLink(
            agent_id=AgentId(first.hello.agent_id),
            stream=next(self._streams),
            outgoing=asyncio.Queue(OUTGOING_BOUND),
            workers={worker_from_proto(worker) for worker in first.hello.workers},
            cache_address=first.hello.cache_address,
        )
        previous = self._links.get(link.agent_id)
        if previous is not None:
            previous.end()
        self._links[link.agent_id] = link
        self._last_join_s = self._clock()
        self._step(self.fleet.hello(device_of(first.hello), link.stream, self._clock()))
        yield pb.AgentCommand(
            welcome=pb.AgentWelcome(incarnation=self._incarnation, heartbeat_every_s=self._patience.heartbeat_every_s)
        )
        if self.revoked_ids:
            yield self._revoked_command()
        reader = asyncio.create_task(self._read(link, events))
        try:
            while (command := await link.outgoing.get()) is not None:
                yield command
        finally:
            reader.cancel()
            if self._links.get(link.agent_id) is link:
                del self._links[link.agent_id]
            link.give_up_answers(self.name_of(link.agent_id))
            self._step(self.fleet.stream_lost(link.agent_id, link.stream, self._clock()))

    def revoke(self, agent_id: AgentId, reason: str) -> None:
        """A device was shut out: its stream ends, nobody waits for its lease, and the others hear of it."""
        self.revoked_ids.add(agent_id)
        for other in self._links.values():
            other.send(self._revoked_command())
        link = self._links.pop(agent_id, None)
        if link is not None:
            link.end()
        self._step(self.fleet.revoke(agent_id, reason))

    def _revoked_command(self) -> pb.AgentCommand:
        return pb.AgentCommand(revoked=pb.Revoked(node_ids=sorted(self.revoked_ids)))

    async def watch_leases(self) -> None:
        """Run forever: devices that stay silent become suspect, then gone.

        A gone device's stream is ended, if it is up at all: only a new hello brings the device back, and an agent whose
        machine slept or stalled says one as soon as its stream breaks.
        """
        while True:
            await asyncio.sleep(self._patience.heartbeat_every_s / 2)
            self._step(self.fleet.tick(self._clock()))
            # One that said goodbye ends its stream itself, once its workers have ended.
            for agent_id in [device.agent_id for device in self.fleet.in_state(DeviceState.GONE)]:
                if (link := self._links.pop(agent_id, None)) is not None:
                    link.end()

    def start_worker(self, agent_id: AgentId, ref: WorkerRef, assignment_json: str) -> bool:
        """Ask an agent to run a worker; False if it is not attached."""
        start = pb.StartWorker(worker=worker_to_proto(ref), assignment_json=assignment_json)
        return self._send(agent_id, pb.AgentCommand(start_worker=start))

    def stop_worker(self, agent_id: AgentId, ref: WorkerRef, reason: str) -> bool:
        """Ask an agent to end a worker; False if it is not attached."""
        stop = pb.StopWorker(worker=worker_to_proto(ref), reason=reason)
        return self._send(agent_id, pb.AgentCommand(stop_worker=stop))

    async def kept_profile(self, agent_id: AgentId, request: ProfileRequest) -> BlockTimings | None:
        """What a device has measured for such a request before; None if it would have to measure, and could.

        Raises:
            AgentLostError: it left.
            AgentError: it has kept nothing and could not measure, or did not answer in time.
        """
        answer = await self._ask_profile(agent_id, request, only_kept=True)
        return None if answer is None else answer.timings

    async def profile(
        self, agent_id: AgentId, request: ProfileRequest, on_milestone: OnMilestone | None = None
    ) -> ProfileAnswer:
        """Let a device measure itself, or tell what it has kept.

        Args:
            agent_id: the device.
            request: what it shall measure.
            on_milestone: hears how far it is, where it measures beside others, and lets it go on.

        Raises:
            AgentLostError: it left.
            AgentError: it could not measure, or did not answer in time.
        """
        answer = await self._ask_profile(agent_id, request, on_milestone=on_milestone)
        if answer is None:
            raise AgentError(f"{self.name_of(agent_id)} answered without seconds; use the same version on all sides")
        return answer

    async def _ask_profile(
        self,
        agent_id: AgentId,
        request: ProfileRequest,
        *,
        only_kept: bool = False,
        on_milestone: OnMilestone | None = None,
    ) -> ProfileAnswer | None:
        request_json = request.model_dump_json()
        return await self.ask(
            agent_id,
            lambda link: link.profiles,
            lambda request_id: pb.AgentCommand(
                profile=pb.ProfileRequest(request_id=request_id, request_json=request_json, only_kept=only_kept)
            ),
            _PROFILE_TIMEOUT_S,
            on_milestone,
        )

    async def ask(
        self,
        agent_id: AgentId,
        answers_of: Callable[[AgentLink], dict[str, asyncio.Future[_Answer]]],
        command: Callable[[str], pb.AgentCommand],
        timeout_s: float,
        on_milestone: OnMilestone | None = None,
    ) -> _Answer:
        """Send a command that has an answer, and wait for it.

        Args:
            agent_id: whom to ask.
            answers_of: where the link keeps the answers that are waited for.
            command: the command with an id of the request.
            timeout_s: longest wait.
            on_milestone: hears of milestones on the way to the answer.

        Raises:
            AgentLostError: the device is not attached, or left.
            AgentError: it says why it cannot, or did not answer in time.
        """
        link = self._links.get(agent_id)
        if link is None:
            raise AgentLostError(f"{self.name_of(agent_id)} is not attached")
        request_id = str(next(self._requests))
        answer: asyncio.Future[_Answer] = asyncio.get_running_loop().create_future()
        answers_of(link)[request_id] = answer
        if on_milestone is not None:
            link.on_milestones[request_id] = on_milestone
        self._send(agent_id, command(request_id))
        try:
            return await asyncio.wait_for(answer, timeout_s)
        except asyncio.TimeoutError:
            raise AgentError(
                f"{self.name_of(agent_id)} did not answer within {timeout_s:.0f} s; see the agent's log"
            ) from None
        finally:
            answers_of(link).pop(request_id, None)
            link.on_milestones.pop(request_id, None)

    def _send(self, agent_id: AgentId, command: pb.AgentCommand) -> bool:
        link = self._links.get(agent_id)
        return link is not None and link.send(command)

    async def _read(self, link: AgentLink, events: AsyncIterator[pb.AgentEvent]) -> None:
        try:
            async for event in events:
                self._step(self.fleet.heartbeat(link.agent_id, link.stream, self._clock()))
                self._take(link, event)
        finally:
            link.end()

    def _take(self, link: AgentLink, event: pb.AgentEvent) -> None:
        match event.WhichOneof("event"):
            case "worker_started":
                link.workers.add(worker_from_proto(event.worker_started.worker))
            case "worker_exited":
                exited = event.worker_exited
                ref = worker_from_proto(exited.worker)
                link.workers.discard(ref)
                link.usage.pop(ref, None)
                self._on_worker_exit(
                    WorkerExit(ref, link.agent_id, exited.exit_code, exited.reason, exited.out_of_memory)
                )
            case "heartbeat":
                link.note_usage(event.heartbeat)
            case "leaving":
                reason = f"{self.name_of(link.agent_id)} left: {event.leaving.reason[:200]}"
                self._step(self.fleet.leave(link.agent_id, link.stream, self._clock(), reason))
                link.give_up_answers(self.name_of(link.agent_id))
            case _:
                link.take_answer(event, self.name_of(link.agent_id))

    def _step(self, step: tuple[Fleet, tuple[Change, ...]]) -> None:
        self.fleet, changes = step
        for change in changes:
            logger.info("%s", change.reason)
            self._on_change(change)
