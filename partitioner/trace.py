"""What happened in one step, of a simulated run or of a real one: spans by worker, on one clock.

Entry points: :class:`Trace`, everything on one clock; :class:`StepTrace`, what the workers of a run recorded, each by
its own clock, and :meth:`StepTrace.on_one_clock`. Clocks are set against each other by what must have come before what,
as NTP does (Mills 1991, IEEE Trans. Communications 39(10)): no input is used before it was made.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

from partitioner.values import PlanValue

WorkerName = tuple[int, int]
"""Stage and replica."""

SpanKind = Literal["forward", "backward", "send down", "send up", "sum", "wait", "update", "ahead"]
"""What a worker or its link does: passes; messages to the next stage and to the one before; gradients added up over
replicas; waiting for an input, or for the commit; the optimiser's update; frozen blocks of the next step's first
micro-batch, which run while sums are on their way."""

PASSES: tuple[SpanKind, ...] = ("forward", "backward")
COMPUTING: tuple[SpanKind, ...] = (*PASSES, "ahead")
MAX_SPANS = 4096
"""Spans that one worker records of one step at the most: what is beyond is left out and counted."""


class Span(PlanValue):
    """What one worker or link did for a while."""

    stage: int
    replica: int
    kind: SpanKind
    micro_batch: int
    """-1 where it is of no single one."""
    start_s: float
    end_s: float


class Trace(PlanValue):
    """Everything that happened in one step, on one clock that begins with it."""

    spans: tuple[Span, ...]

    @property
    def step_s(self) -> float:
        """End of the last span."""
        return max((span.end_s for span in self.spans), default=0.0)

    @property
    def workers(self) -> tuple[WorkerName, ...]:
        """All workers that did anything."""
        return tuple(sorted({(span.stage, span.replica) for span in self.spans}))

    def busy_s(self) -> dict[WorkerName, float]:
        """Seconds of computation of every worker."""
        found: dict[WorkerName, float] = {}
        for span in self.spans:
            if span.kind in COMPUTING:
                name = (span.stage, span.replica)
                found[name] = found.get(name, 0.0) + span.end_s - span.start_s
        return found

    def durations(self) -> dict[tuple[WorkerName, bool, int], float]:
        """Seconds of every pass by worker, whether it is forward, and micro-batch."""
        return {
            ((span.stage, span.replica), span.kind == "forward", span.micro_batch): span.end_s - span.start_s
            for span in self.spans
            if span.kind in PASSES
        }


class WorkerTrace(PlanValue):
    """What one worker recorded of one step, in seconds of its own monotonic clock."""

    stage: int
    replica: int
    spans: tuple[Span, ...]
    """In any order, from any zero of the clock, at most MAX_SPANS."""
    num_left_out: int = 0
    """Spans beyond MAX_SPANS."""


class StepTrace(PlanValue):
    """What all workers of a job recorded of one step."""

    step: int
    plan_epoch: int
    workers: tuple[WorkerTrace, ...]

    def on_one_clock(self) -> Trace:
        """All spans on one clock, from the first one's start on.

        Every worker's clock is set against those of the neighbouring stages: a forward pass starts after that of the
        same micro-batch above it has ended, a backward pass after that below. Between the two bounds the middle is
        taken; where no gradient comes back a message counts as taking no time. A worker that shares no micro-batch
        with anybody ends when the others do.
        """
        by_name = {(worker.stage, worker.replica): worker for worker in self.workers}
        offset_s: dict[WorkerName, float] = {}
        while len(offset_s) < len(by_name):
            known = {name: _moved(by_name[name], seconds) for name, seconds in offset_s.items()}
            left = [name for name in sorted(by_name) if name not in offset_s]
            bounds = ((name, _bounds(by_name[name], known.values())) for name in left)
            told = next(((name, found) for name, found in bounds if found is not None), None)
            if told is not None:
                offset_s[told[0]] = _middle(*told[1])
            else:
                offset_s[left[0]] = _aligned_ends(by_name[left[0]], known.values())
        spans = [span for name, worker in by_name.items() for span in _moved(worker, offset_s[name]).spans]
        zero_s = min((span.start_s for span in spans), default=0.0)
        moved = (_later(span, -zero_s) for span in spans)
        return Trace(spans=tuple(sorted(moved, key=lambda span: (span.start_s, span.stage, span.replica))))


def _later(span: Span, seconds: float) -> Span:
    return span.model_copy(update={"start_s": span.start_s + seconds, "end_s": span.end_s + seconds})


def _moved(worker: WorkerTrace, seconds: float) -> WorkerTrace:
    return worker.model_copy(update={"spans": tuple(_later(span, seconds) for span in worker.spans)})


def _passes(worker: WorkerTrace, kind: SpanKind) -> dict[int, Span]:
    return {span.micro_batch: span for span in worker.spans if span.kind == kind}


def _bounds(worker: WorkerTrace, known: Iterable[WorkerTrace]) -> tuple[float, float] | None:
    """Between which two numbers of seconds lies what must be added to a worker's clock; None: nothing tells."""
    own = {kind: _passes(worker, kind) for kind in PASSES}
    low_s, high_s = -math.inf, math.inf
    for other in known:
        if abs(other.stage - worker.stage) != 1:
            continue
        theirs = {kind: _passes(other, kind) for kind in PASSES}
        # Forward passes go down the pipeline, backward passes up: what comes first is the giver's.
        for kind in PASSES:
            is_giver = (worker.stage < other.stage) == (kind == "forward")
            for m in own[kind].keys() & theirs[kind].keys():
                if is_giver:
                    high_s = min(high_s, theirs[kind][m].start_s - own[kind][m].end_s)
                else:
                    low_s = max(low_s, theirs[kind][m].end_s - own[kind][m].start_s)
    return None if (low_s, high_s) == (-math.inf, math.inf) else (low_s, high_s)


def _middle(low_s: float, high_s: float) -> float:
    if math.isinf(low_s) or math.isinf(high_s):
        return high_s if math.isinf(low_s) else low_s
    return (low_s + high_s) / 2


def _aligned_ends(worker: WorkerTrace, known: Iterable[WorkerTrace]) -> float:
    """The last span ends with the last one of those whose clocks are set; the first worker of all keeps its own."""
    ends = [span.end_s for other in known for span in other.spans]
    own = [span.end_s for span in worker.spans]
    return max(ends) - max(own) if ends and own else 0.0
