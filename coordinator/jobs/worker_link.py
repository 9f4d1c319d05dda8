"""The coordinator's end of the workers' control streams of one job.

Keeps what each worker has last said, so that the driver can wait for a condition over all of them instead of for
messages, and sends commands to those that are attached; what a worker missed is sent again when it comes back.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field

from plutino.types import Unit, WorkerRef
from plutino.wire.convert import unit_from_proto
from protos import workers_pb2 as pb


@dataclass(slots=True)
class WorkerStatus:
    """What is known of one worker of the present plan epoch."""

    ref: WorkerRef
    outgoing: asyncio.Queue[pb.WorkerCommand | None] | None = None
    """None while the worker is not attached."""
    progress: pb.LoadProgress | None = None
    loaded: pb.StageLoaded | None = None
    is_linked: bool = False
    next_step: int = 0
    vote: pb.StepReady | None = None
    """The newest vote."""
    done_units: dict[Unit, pb.UnitDone] = field(default_factory=dict)
    is_cache_full: bool = False
    """People were told that its activation cache has no more room."""
    restored_step: int | None = None
    verified: dict[str, pb.PartVerified] = field(default_factory=dict)

    @property
    def is_attached(self) -> bool:
        """Whether its stream is up."""
        return self.outgoing is not None

    def send(self, command: pb.WorkerCommand) -> None:
        """Send if attached."""
        if self.outgoing is not None:
            self.outgoing.put_nowait(command)


class JobWorkers:
    """All workers of a job's present plan epoch."""

    def __init__(
        self,
        *,
        incarnation: int,
        on_shadow: Callable[[WorkerRef, pb.ShadowStored], None],
        on_trouble: Callable[[WorkerRef, str, str], None],
        on_trace: Callable[[WorkerRef, pb.StepTrace], None],
    ) -> None:
        self._incarnation = incarnation
        self._on_shadow = on_shadow
        self._on_trouble = on_trouble
        self._on_trace = on_trace
        self._statuses: dict[WorkerRef, WorkerStatus] = {}
        self._outstanding: dict[str, tuple[frozenset[WorkerRef] | None, pb.WorkerCommand]] = {}
        self._known_units: set[Unit] = set()
        self._changed = asyncio.Condition()

    def expect(self, refs: Iterable[WorkerRef]) -> None:
        """Replace the set of workers; what is known of those that stay is kept."""
        refs = set(refs)
        if refs == set(self._statuses):
            return
        for ref in set(self._statuses) - refs:
            self._statuses[ref].send(pb.WorkerCommand(finish=pb.Finish(reason="its plan epoch is over")))
        self._statuses = {ref: self._statuses.get(ref) or WorkerStatus(ref) for ref in sorted(refs)}
        self._outstanding.clear()
        self._known_units.clear()

    @property
    def statuses(self) -> tuple[WorkerStatus, ...]:
        """All workers, by stage and replica."""
        return tuple(self._statuses.values())

    def status(self, ref: WorkerRef) -> WorkerStatus | None:
        """One worker, if it belongs to the present plan epoch."""
        return self._statuses.get(ref)

    async def serve(
        self, ref: WorkerRef, hello: pb.WorkerHello, events: AsyncIterator[pb.WorkerEvent]
    ) -> AsyncIterator[pb.WorkerCommand]:
        """One stream of a worker; a newer stream replaces an older one."""
        status = self._statuses.get(ref)
        if status is None:
            yield pb.WorkerCommand(finish=pb.Finish(reason="this plan epoch is over"))
            return
        outgoing: asyncio.Queue[pb.WorkerCommand | None] = asyncio.Queue()
        if status.outgoing is not None:
            status.outgoing.put_nowait(None)
        status.outgoing = outgoing
        self._take_hello(status, hello)
        await self.wake()
        reader = asyncio.create_task(self._read(status, events, outgoing))
        try:
            while (command := await outgoing.get()) is not None:
                yield command
        finally:
            reader.cancel()
            if status.outgoing is outgoing:
                status.outgoing = None

    def tell(
        self, command: pb.WorkerCommand, *, key: str | None = None, only: Iterable[WorkerRef] | None = None
    ) -> None:
        """Send to all workers, or to some; with a key it is sent again to whoever re-attaches, until forgotten."""
        refs = None if only is None else frozenset(only)
        if key is not None:
            self._outstanding[key] = (refs, command)
        for status in self._statuses.values():
            if refs is None or status.ref in refs:
                status.send(command)

    def forget(self, prefix: str) -> None:
        """Stop sending commands whose key starts so again."""
        for key in [key for key in self._outstanding if key.startswith(prefix)]:
            del self._outstanding[key]

    def begin_unit(self, unit: Unit) -> None:
        """From now on the unit is this coordinator's own, and is not cancelled on re-attach."""
        self._known_units.add(unit)

    def end_unit(self, unit: Unit) -> None:
        """The unit is over on all workers."""
        self._known_units.discard(unit)
        for status in self._statuses.values():
            status.done_units.pop(unit, None)

    async def wait(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition over the statuses holds."""
        async with self._changed:
            await self._changed.wait_for(condition)

    def _take_hello(self, status: WorkerStatus, hello: pb.WorkerHello) -> None:
        status.is_linked = hello.linked
        status.next_step = hello.next_step
        status.send(pb.WorkerCommand(welcome=pb.WorkerWelcome(incarnation=self._incarnation)))
        for unit_message in hello.units:
            unit = unit_from_proto(unit_message)
            # A training unit is a pure function of its step and so can only be the very one that will be fed again;
            # any other unit of an earlier coordinator is abandoned.
            if unit.kind != unit.kind.TRAIN and unit not in self._known_units:
                # All workers, not only this one: tensors of the unit may wait in any of their queues.
                self.tell(pb.WorkerCommand(cancel_unit=pb.CancelUnit(unit=unit_message)))
        for refs, command in self._outstanding.values():
            if refs is None or status.ref in refs:
                status.send(command)

    async def _read(
        self,
        status: WorkerStatus,
        events: AsyncIterator[pb.WorkerEvent],
        outgoing: asyncio.Queue[pb.WorkerCommand | None],
    ) -> None:
        try:
            async for event in events:
                self._take(status, event)
                await self.wake()
        finally:
            outgoing.put_nowait(None)

    def _take(self, status: WorkerStatus, event: pb.WorkerEvent) -> None:
        match event.WhichOneof("event"):
            case "load_progress":
                status.progress = event.load_progress
            case "loaded":
                status.loaded = event.loaded
            case "links_up":
                status.is_linked = True
            case "step_ready":
                if status.vote is None or event.step_ready.step >= status.vote.step:
                    status.vote = event.step_ready
            case "unit_done":
                unit = unit_from_proto(event.unit_done.unit)
                if unit in self._known_units:
                    status.done_units[unit] = event.unit_done
            case "shadow_stored":
                self._on_shadow(status.ref, event.shadow_stored)
            case "step_trace":
                self._on_trace(status.ref, event.step_trace)
            case "restored":
                status.restored_step = event.restored.step
            case "part_verified":
                status.verified[event.part_verified.request_id] = event.part_verified
            case "failed":
                self._on_trouble(status.ref, event.failed.error, event.failed.reason)
            case "peer_lost":
                lost = event.peer_lost
                self._on_trouble(
                    status.ref,
                    "PeerLostError",
                    f"its peer {lost.peer_stage_index}.{lost.peer_replica_index}: {lost.reason}",
                )

    async def wake(self) -> None:
        """Let every :meth:`wait` look again."""
        async with self._changed:
            self._changed.notify_all()
