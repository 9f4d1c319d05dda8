"""Which steps the workers record, and what becomes of it: gathered from all workers, then written down."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import get_args

from partitioner.trace import MAX_SPANS, Span, SpanKind, StepTrace, WorkerTrace
from plutino.errors import WireError
from plutino.types import WorkerRef
from protos import workers_pb2 as pb

logger = logging.getLogger(__name__)

RECORD_EVERY = 64
_FIRST = 2
"""The two steps before it also fill caches and the allocator."""
_MAX_GATHERED = 4
"""Steps that some worker has told of and another has not: a worker that is lost never will."""

KINDS: tuple[SpanKind, ...] = get_args(SpanKind)


def is_recorded(step: int, *, start_step: int, end_step: int) -> bool:
    """Whether a step is one that workers record: a function of the step, so that a repeated feed says the same.

    Args:
        step: the step.
        start_step: the first one under its plan.
        end_step: number of steps after which training is complete.
    """
    first = min(start_step + _FIRST, end_step - 1)
    return step >= first and (step - first) % RECORD_EVERY == 0


class TraceGatherer:
    """Puts together what the workers of one plan epoch recorded."""

    def __init__(self) -> None:
        self._plan_epoch = 0
        self._gathered: dict[int, dict[WorkerRef, WorkerTrace]] = {}

    def add(self, ref: WorkerRef, message: pb.StepTrace, workers: Collection[WorkerRef]) -> StepTrace | None:
        """Add what a worker told; gives the whole step once nobody is missing.

        Raises:
            WireError: the message breaks its bounds.
        """
        if ref.plan_epoch != self._plan_epoch:
            self._plan_epoch = ref.plan_epoch
            self._gathered = {}
        parts = self._gathered.setdefault(message.step, {})
        parts[ref] = worker_trace(ref, message)
        if not parts.keys() >= set(workers):
            for oldest in list(self._gathered)[:-_MAX_GATHERED]:
                del self._gathered[oldest]
            return None
        del self._gathered[message.step]
        return StepTrace(
            step=message.step, plan_epoch=ref.plan_epoch, workers=tuple(parts[one] for one in sorted(workers))
        )


def worker_trace(ref: WorkerRef, message: pb.StepTrace) -> WorkerTrace:
    """A worker's spans from the wire.

    Raises:
        WireError: there are more than MAX_SPANS, lists of different lengths, or kinds that nobody knows.
    """
    num_spans = len(message.kinds)
    lengths = {num_spans, len(message.micro_batches), len(message.start_us), len(message.duration_us)}
    if num_spans > MAX_SPANS or len(lengths) > 1 or any(kind >= len(KINDS) for kind in message.kinds):
        raise WireError(f"{ref} sent a record of step {message.step} that is malformed ({num_spans} spans)")
    fields = zip(message.kinds, message.micro_batches, message.start_us, message.duration_us, strict=True)
    return WorkerTrace(
        stage=ref.stage_index,
        replica=ref.replica_index,
        spans=tuple(
            Span(
                stage=ref.stage_index,
                replica=ref.replica_index,
                kind=KINDS[kind],
                micro_batch=micro_batch,
                start_s=start_us / 1e6,
                end_s=(start_us + duration_us) / 1e6,
            )
            for kind, micro_batch, start_us, duration_us in fields
        ),
        num_left_out=message.num_left_out,
    )
