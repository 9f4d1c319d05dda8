"""Seconds of a pass, timed as it runs in a stage: with cold caches, at a quota's rate, beside whoever computes here."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edge_node.compute_device import ComputeDevice
from edge_node.meeting import Meeting
from edge_node.processors import processor_quota

_REPEATS = 3
_LEAST_S = 0.5
"""Each timing is repeated until it has taken this long, but at least _REPEATS times; the median counts. A step has
hundreds of passes, slow ones among them: the fastest of a few says how short one can be, not how long they are."""
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


def time_passes(device: ComputeDevice, passes: Passes, meeting: Meeting) -> PassSeconds:
    """Time passes from the moment at which all of a meeting are ready until the last has had enough.

    Whoever has had enough computes on, and all that it times counts: so every device is timed beside every other, and a
    quick one never beside the quiet that it leaves a slow one.
    """
    # First uses build kernels, which is no part of any pass and must not happen beside the others' windows.
    passes.backward(passes.forward())
    if passes.recomputing is not None:
        _run_recomputing(passes)
    timer = _Timer(device)
    took_s: deque[tuple[float, ...]] = deque(maxlen=_MOST_KEPT)
    spent_s = 0.0
    meeting.begin()
    while len(took_s) < _REPEATS or spent_s < _LEAST_S or not meeting.is_over():
        one_s = _time_once(passes, timer)
        spent_s += sum(one_s)
        took_s.append(one_s)
    return PassSeconds(*(statistics.median(each) for each in zip(*took_s, strict=True)))


def fastest_s(device: ComputeDevice, call: Callable[[], Any], *, least_s: float = 0.05) -> float:
    """Seconds of the fastest of some calls, whose caches are warm."""
    call()  # first use of a shape builds the kernels for it
    timer = _Timer(device, evicts=False)
    fastest, spent_s, repeats = float("inf"), 0.0, 0
    while repeats < _REPEATS or spent_s < least_s:
        _, took_s = timer.run(call)
        fastest = min(fastest, took_s)
        spent_s += took_s
        repeats += 1
    return fastest


class _Timer:
    """Times calls on a device."""

    def __init__(self, device: ComputeDevice, *, evicts: bool = True) -> None:
        self._device = device
        self._evicted = torch.zeros(_EVICTED_BYTES // 4) if evicts and not device.is_cuda else None
        self._quota = None if device.is_cuda else processor_quota()

    def run(self, call: Callable[[], Any]) -> tuple[Any, float]:
        """What a call gives, and its seconds."""
        if self._evicted is not None:
            self._evicted.add_(1.0)
        self._device.wait()
        started_s, used_s = time.perf_counter(), time.process_time()
        result = call()
        self._device.wait()
        took_s, used_s = time.perf_counter() - started_s, time.process_time() - used_s
        # All threads' processor time at the rate that the quota gives; a quota is no limit to what is slower anyway.
        return result, took_s if self._quota is None else max(took_s, used_s / self._quota)


def _time_once(passes: Passes, timer: _Timer) -> tuple[float, ...]:
    output, forward_s = timer.run(passes.forward)
    _, backward_s = timer.run(lambda: passes.backward(output))
    if passes.recomputing is None:
        return forward_s, backward_s
    with passes.recomputing():
        kept = passes.forward()
    _, recomputed_s = timer.run(lambda: passes.backward(kept))
    return forward_s, backward_s, recomputed_s


def _run_recomputing(passes: Passes) -> None:
    assert passes.recomputing is not None
    with passes.recomputing():
        output = passes.forward()
    passes.backward(output)
