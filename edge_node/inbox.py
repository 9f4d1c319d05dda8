"""What the coordinator has told a worker and the worker has not done yet, as one thread-safe queue.

Commands come on the control stream's thread; the compute thread takes them one by one. A unit of work comes as several
feed messages, in any number of repetitions; it is taken once it is whole, in the order in which units were first heard
of, and never a second time: a coordinator repeats its feeds to whoever re-attaches. Decisions on a step are not queued:
the compute thread waits for exactly the one it voted on.

Rows that break their bounds surface where they would have been used: the compute thread gets the error.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from edge_node.engine.unit import UnitInput
from edge_node.transport.inbox import UnitFence
from plutino.data.batches import MicroBatchRows
from plutino.errors import PlutinoError
from plutino.types import Unit, UnitKind
from plutino.wire.convert import unit_from_proto
from protos import workers_pb2 as pb


@dataclass(frozen=True, slots=True)
class UnitTask:
    """A whole unit, ready to run."""

    work: UnitInput
    generate: pb.GenerateOptions | None
    sample_indices: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class CommandTask:
    """A command that is done between units."""

    command: pb.WorkerCommand


Task = UnitTask | CommandTask


@dataclass(slots=True)
class _Gathering:
    unit: Unit
    num_micro_batches: int
    loss_weight: float
    needed: frozenset[int]
    """Micro-batches whose rows this worker reads."""
    without_adapter: bool = False
    is_recorded: bool = False
    by_reward_adapter: bool = False
    rows: dict[int, MicroBatchRows] = field(default_factory=dict)
    generate: dict[int, pb.GenerateOptions] = field(default_factory=dict)

    @property
    def is_whole(self) -> bool:
        return self.needed <= self.rows.keys()

    @property
    def work(self) -> UnitInput:
        return UnitInput(
            self.unit,
            self.num_micro_batches,
            self.loss_weight,
            tuple(self.rows.get(m) for m in range(self.num_micro_batches)),
            self.without_adapter,
            self.is_recorded,
            self.by_reward_adapter,
        )


class Inbox:
    """Tasks and decisions of one worker.

    Args:
        reads_rows: whether this worker reads the rows of a micro-batch of a unit of some kind.
        decode_rows: reads and checks them.
    """

    def __init__(
        self, *, reads_rows: Callable[[UnitKind, int], bool], decode_rows: Callable[[pb.Feed], MicroBatchRows]
    ) -> None:
        self._reads_rows = reads_rows
        self._decode_rows = decode_rows
        self._changed = threading.Condition()
        self._order: list[Unit | CommandTask] = []
        self._gathering: dict[Unit, _Gathering] = {}
        self._current: Unit | None = None
        self._fence = UnitFence()
        self._next_step = 0
        self._decisions: dict[int, pb.Commit | pb.Abort] = {}
        self._finish: str | None = None
        self._failure: PlutinoError | None = None

    def start_at(self, step: int) -> None:
        """Steps below this one are done: feeds and decisions of theirs are ignored."""
        with self._changed:
            self._next_step = step
            self._decisions = {s: d for s, d in self._decisions.items() if s >= step}
            self._changed.notify_all()

    def feed(self, feed: pb.Feed) -> None:
        """Take one part of a unit; parts of units that are under way or over are ignored."""
        with self._changed:
            try:
                self._gather(feed)
            except PlutinoError as error:
                # Raised here it would end the control stream's thread, and nobody would ever hear of it.
                self._failure = error
            self._changed.notify_all()

    def command(self, command: pb.WorkerCommand) -> None:
        """Queue a command to be done between units."""
        with self._changed:
            self._order.append(CommandTask(command))
            self._changed.notify_all()

    def decide(self, step: int, decision: pb.Commit | pb.Abort) -> None:
        """Take the coordinator's decision on a step; repeated ones are ignored."""
        with self._changed:
            if step >= self._next_step:
                self._decisions[step] = decision
                self._changed.notify_all()

    def cancel(self, unit: Unit) -> bool:
        """Forget a unit; True if it is the one being run."""
        with self._changed:
            self._fence.cancel(unit)
            self._gathering.pop(unit, None)
            if unit in self._order:
                self._order.remove(unit)
                self._changed.notify_all()
            return unit == self._current

    def finish(self, reason: str) -> None:
        """End: whoever waits gets None."""
        with self._changed:
            self._finish = reason
            self._changed.notify_all()

    @property
    def units(self) -> tuple[Unit, ...]:
        """Units heard of and not finished."""
        with self._changed:
            current = () if self._current is None else (self._current,)
            return (*current, *(entry for entry in self._order if isinstance(entry, Unit)))

    def take(self) -> Task | None:
        """Wait for the next task, in order; None once finished. The task taken before it is over by then.

        Raises:
            FrameError: rows that were fed break their bounds.
        """
        with self._changed:
            self._end_current()
            while True:
                if self._finish is not None:
                    return None
                if self._failure is not None:
                    raise self._failure
                if self._order and (task := self._ready(self._order[0])) is not None:
                    self._order.pop(0)
                    return task
                self._changed.wait()

    def following_step(self) -> UnitInput | None:
        """The step after the one that runs, if all of its rows are here; it is taken when its turn comes."""
        with self._changed:
            gathering = self._gathering.get(Unit(UnitKind.TRAIN, self._next_step + 1))
            return gathering.work if gathering is not None and gathering.is_whole else None

    def wait_decision(self, step: int) -> pb.Commit | pb.Abort | None:
        """Wait for the decision on a step that was voted on; None once finished."""
        with self._changed:
            while step not in self._decisions and self._finish is None:
                self._changed.wait()
            return self._decisions.pop(step, None)

    def _gather(self, feed: pb.Feed) -> None:
        unit = unit_from_proto(feed.unit)
        if self._fence.is_over(unit) or unit == self._current:
            return
        if unit.kind == UnitKind.TRAIN and unit.serial < self._next_step:
            return
        gathering = self._gathering.get(unit)
        if gathering is None:
            needed = frozenset(m for m in range(feed.num_micro_batches) if self._reads_rows(unit.kind, m))
            gathering = _Gathering(
                unit, feed.num_micro_batches, feed.loss_weight, needed, feed.without_adapter, feed.recorded
            )
            gathering.by_reward_adapter = feed.by_reward_adapter
            self._gathering[unit] = gathering
            self._order.append(unit)
        if feed.micro_batch < feed.num_micro_batches:
            gathering.rows[feed.micro_batch] = self._decode_rows(feed)
            if feed.HasField("generate"):
                gathering.generate[feed.micro_batch] = feed.generate

    def _end_current(self) -> None:
        # Training steps have a fence of their own, the next step, which moves with the decision and not with the run.
        if self._current is not None and self._current.kind != UnitKind.TRAIN:
            self._fence.finish(self._current)
        self._current = None

    def _ready(self, entry: Unit | CommandTask) -> Task | None:
        if isinstance(entry, CommandTask):
            return entry
        gathering = self._gathering[entry]
        is_due = entry.kind != UnitKind.TRAIN or entry.serial == self._next_step
        if not gathering.is_whole or not is_due:
            return None
        del self._gathering[entry]
        self._current = entry
        work = gathering.work
        if not gathering.generate:
            return UnitTask(work, None, ())
        samples = tuple(tuple(gathering.generate[m].sample_indices) for m in range(gathering.num_micro_batches))
        return UnitTask(work, gathering.generate[0], samples)
