"""Seconds of a pass, timed as it runs in a stage: with cold caches, at a quota's rate, beside whoever computes here."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edge_node.compute_device import ComputeDevice
from edge_node.meeting import ALONE, Meeting
from edge_node.processors import processor_quota

LEAST_S = 1.0
"""Each window is at least that long, and three passes; the median of its passes counts. A step has hundreds of passes,
slow ones among them: the fastest of a few says how short one can be, not how long they are."""
_REPEATS = 3
_MOST_KEPT = 10_000
"""Of the passes of one window: a card that waits for a slow neighbour runs no end of short ones."""
_EVICTED_BYTES = 32 << 20
"""Written before each timing on a processor. In a stage other blocks' weights pass through the caches between two
passes of one block; one that is timed alone, in a loop, finds its own there and looks faster than it will be."""


@dataclass(frozen=True, slots=True)
class Passes:
    """What is timed.

    Args:
        forward: one pass; gives what ``backward`` takes.
        backward: back-propagates it.
        recomputing: within it what runs forward recomputes when it is back-propagated; None: that is not timed.
    """

    forward: Callable[[], Tensor]
    backward: Callable[[Tensor], Any]
    recomputing: Callable[[], AbstractContextManager[None]] | None = None


@dataclass(frozen=True, slots=True)
class PassSeconds:
    """Medians."""

    forward_s: float
    backward_s: float
    recomputed_backward_s: float | None = None
    """Recomputation included; None: not timed."""


class PassTimer:
    """Times passes on a device.

    Args:
        device: the device.
        meeting: whom it waits for.
        least_s: of a window.
    """

    def __init__(self, device: ComputeDevice, meeting: Meeting = ALONE, *, least_s: float = LEAST_S) -> None:
        self.device = device
        self._meeting = meeting
        self._least_s = least_s
        self._quota = None if device.is_cuda else processor_quota()

    def time(self, passes: Passes, share: float = 1.0) -> PassSeconds:
        """Time passes from the moment at which all of the meeting are ready until the last has had enough.

        ``share`` of a window is enough for it.

        Whoever has had enough computes on, and all that it times counts: so every device is timed beside every other,
        and a quick one never leaves a slow one quiet.
        """
        # First uses build kernels, which is no part of any pass and must not happen in the others' windows.
        passes.backward(passes.forward())
        if passes.recomputing is not None:
            passes.backward(_forward_recomputing(passes, passes.recomputing))
        evicted = None if self.device.is_cuda else torch.zeros(_EVICTED_BYTES // 4)
        took_s: deque[tuple[float, ...]] = deque(maxlen=_MOST_KEPT)
        self._meeting.begin()
        enough_s = time.perf_counter() + share * self._least_s
        while len(took_s) < _REPEATS or time.perf_counter() < enough_s or not self._meeting.is_over():
            took_s.append(self._time_once(passes, evicted))
        return PassSeconds(*(statistics.median(each) for each in zip(*took_s, strict=True)))

    def fastest_s(self, call: Callable[[], Any], *, least_s: float = 0.05) -> float:
        """Seconds of the fastest of some calls, whose caches are warm."""
        call()  # first use of a shape builds the kernels for it
        fastest_s, spent_s, repeats = float("inf"), 0.0, 0
        while repeats < _REPEATS or spent_s < least_s:
            _, took_s = self._run(call, None)
            fastest_s = min(fastest_s, took_s)
            spent_s += took_s
            repeats += 1
        return fastest_s

    def fastest_in_turns(self, calls: Mapping[str, Callable[[], Any]], *, turns: int) -> dict[str, float]:
        """Seconds of each call's fastest turn: whoever keeps the machine busy meanwhile slows all of them."""
        for call in calls.values():
            call()
        seconds = dict.fromkeys(calls, float("inf"))
        for _ in range(turns):
            for name, call in calls.items():
                seconds[name] = min(seconds[name], self._run(call, None)[1])
        return seconds

    def _time_once(self, passes: Passes, evicted: Tensor | None) -> tuple[float, ...]:
        output, forward_s = self._run(passes.forward, evicted)
        _, backward_s = self._run(lambda: passes.backward(output), evicted)
        if passes.recomputing is None:
            return forward_s, backward_s
        kept = _forward_recomputing(passes, passes.recomputing)
        _, recomputed_s = self._run(lambda: passes.backward(kept), evicted)
        return forward_s, backward_s, recomputed_s

    def _run(self, call: Callable[[], Any], evicted: Tensor | None) -> tuple[Any, float]:
        """What a call gives, and its seconds."""
        if evicted is not None:
            evicted.add_(1.0)
        self.device.wait()
        started_s, used_s = time.perf_counter(), time.process_time()
        result = call()
        self.device.wait()
        took_s, used_s = time.perf_counter() - started_s, time.process_time() - used_s
        # All threads' processor time at the rate that the quota gives; a quota is no limit to what is slower anyway.
        return result, took_s if self._quota is None else max(took_s, used_s / self._quota)


def _forward_recomputing(passes: Passes, recomputing: Callable[[], AbstractContextManager[None]]) -> Tensor:
    with recomputing():
        return passes.forward()
