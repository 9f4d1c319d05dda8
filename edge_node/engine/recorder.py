"""What one worker did in one step, span by span, for steps that the coordinator chose."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from edge_node.engine.schedule import Action, Backward, Forward, Receive
from edge_node.transport.base import MessageKind
from partitioner.trace import MAX_SPANS, SpanKind


@dataclass(frozen=True, slots=True)
class RecordedSpan:
    """Something that took a while, in seconds of the recorder's clock."""

    kind: SpanKind
    micro_batch: int
    """-1 where it is of no single one."""
    start_s: float
    end_s: float


class StepRecorder:
    """Gathers the spans of a step.

    A message's span is that of handing it to the transport: it travels beside the computation. Passes of a reference
    model are not recorded.

    Args:
        device: where the worker computes; a card works on beside the program, so each span of one waits for it.
        clock: monotonic seconds.
    """

    def __init__(self, device: torch.device, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._device = device
        self._clock = clock
        self.spans: list[RecordedSpan] = []
        self.num_left_out = 0
        """Spans beyond MAX_SPANS."""

    def end_action(self, action: Action, start_s: float) -> None:
        """An action of the schedule that began at ``start_s`` has ended."""
        self.end(_kind_of(action), action.micro_batch, start_s)

    def end(self, kind: SpanKind, micro_batch: int, start_s: float) -> None:
        """Something that began at ``start_s`` has ended."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        if len(self.spans) == MAX_SPANS:
            self.num_left_out += 1
            return
        self.spans.append(RecordedSpan(kind, micro_batch, start_s, self._clock()))


def _kind_of(action: Action) -> SpanKind:
    match action:
        case Receive():
            return "wait"
        case Forward():
            return "forward"
        case Backward():
            return "backward"
        case _:
            return "send down" if action.kind is MessageKind.FORWARD else "send up"
