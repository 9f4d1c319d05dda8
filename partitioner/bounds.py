"""Seconds that no step can beat, for all cuts of a layout at once.

Entry point: :class:`Bounds`. A dynamic program from the last stage to the first, in the shape of PAC's
(arXiv:2408.10746 eq. 2-3), whose states are the block where a stage starts. What PAC leaves out stands inside the
recurrence: links, the way there and back, and a stage's place in the pipeline, which decides how long it must wait.

For a stage k with forward f, backward b, window w and M micro-batches, let R be the seconds of one micro-batch from the
end of its forward pass on k until its gradient is back there. Then a step takes at least

- the way of one micro-batch to k and back, and the step of k and all behind it;
- M (f + b), and the waiting before the first backward pass, R - (w - 1) f, and, where M > w, that before the last one,
  R - (w - 1) b: in between the stage has no more than w - 1 other passes to run;
- ceil(M / w) round trips f + b + R, because micro-batch m + w starts after m has come back;
- M - 1 messages over the link behind k and one round trip.

R is taken as short as any cut makes it, so each of these holds for every cut. A stage of several replicas gives the
first and last with the quickest of them, and its busiest replica's seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from partitioner.block_seconds import blocks_s
from partitioner.layout import Group, Layout, ahead_of
from partitioner.place import Place
from partitioner.pricing import Pricer
from partitioner.replay import Floats


@dataclass(frozen=True, slots=True)
class SuffixBound:
    """For every start block a: what the last stages of a layout need if they hold blocks [a, end)."""

    step_s: Floats
    """No step of them alone is shorter; infinite where they do not fit or cannot beat the limit."""
    round_trip_s: Floats
    """Least seconds of one micro-batch through them, there and back."""
    tail_s: Floats
    """Least seconds until the last of them has added up its replicas' gradients."""


@dataclass(frozen=True, slots=True)
class StageTerms:
    """Seconds of one stage for all (start, end), infinite in ``busy_s`` where it does not fit."""

    forward_s: Floats
    backward_s: Floats
    busy_s: Floats
    """The busiest replica's computation in the whole step."""
    trip_s: Floats
    """One micro-batch through the stage and over its link, there and back."""
    link_trip_s: Floats
    """The link's part of it."""
    comes_back: Floats
    """1 where a gradient comes back, else 0."""
    sum_s: Floats
    link_s: float
    """Seconds a message occupies the link; 0 behind a group of several."""
    window: int
    is_single: bool


class Bounds:
    """Bounds of many layouts on one fleet; what layouts have in common at their ends is worked out once."""

    def __init__(self, pricer: Pricer) -> None:
        self._pricer = pricer
        self._found: dict[tuple[Layout, int, int], SuffixBound] = {}
        self._terms: dict[tuple[Group, Group, int, int, int], StageTerms] = {}
        self._bytes: dict[tuple[Place, bool], Floats] = {}
        self._seconds: dict[tuple[int, bool], tuple[Floats, Floats]] = {}
        num_blocks = pricer.table.num_blocks
        starts, ends = np.meshgrid(np.arange(num_blocks + 1), np.arange(num_blocks + 1), indexing="ij")
        self._starts, self._ends = starts, ends
        self._is_stage = starts < ends

    def of_suffix(self, layout: Layout, k: int) -> SuffixBound:
        """Bound of stages k and on of a layout."""
        before = len(layout[k - 1]) if 0 < k < len(layout) else 0
        # Generation's caches depend on the number of stages, all else on what lies behind.
        key = (layout[k:], before, len(layout) if self._pricer.shape.generate_rows else int(k == 0))
        if key not in self._found:
            self._found[key] = self._make(layout, k)
        return self._found[key]

    def step_bound_s(self, layout: Layout) -> float:
        """No step of this layout is shorter, whatever its cuts; infinite if none fits."""
        whole = self.of_suffix(layout, 0)
        return max(float(whole.step_s[0]), float(whole.tail_s[0]))

    def _make(self, layout: Layout, k: int) -> SuffixBound:
        num_blocks = self._pricer.table.num_blocks
        if k == len(layout):
            step_s = np.full(num_blocks + 1, np.inf)
            step_s[num_blocks] = 0.0
            return SuffixBound(step_s, step_s.copy(), step_s.copy())
        rest = self.of_suffix(layout, k + 1)
        if np.isinf(rest.step_s).all():
            return SuffixBound(rest.step_s, rest.step_s, rest.step_s)
        terms = self.terms(layout, k)
        step_s = self.combined(terms, rest.step_s[None, :], rest.round_trip_s[None, :])
        round_trip_s = np.where(np.isinf(step_s), np.inf, terms.trip_s + rest.round_trip_s[None, :])
        tail_s = np.maximum(terms.busy_s + terms.sum_s, rest.tail_s[None, :])
        return SuffixBound(step_s.min(axis=1), round_trip_s.min(axis=1), tail_s.min(axis=1))

    def combined(self, terms: StageTerms, rest_s: Floats, rest_trip_s: Floats) -> Floats:
        """The bound with a stage in front of others whose bound and round trip are known, by (start, end)."""
        return self.combined_at(terms, (slice(None), slice(None)), rest_s, rest_trip_s)

    def combined_at(self, terms: StageTerms, index: Any, rest_s: Floats, rest_trip_s: Floats) -> Floats:
        """The same at some (start, end) only."""
        m, w = self._pricer.num_micro_batches, terms.window
        busy_s, stage_trip_s, link_trip_s = terms.busy_s[index], terms.trip_s[index], terms.link_trip_s[index]
        with np.errstate(invalid="ignore"):
            found = np.maximum(busy_s, stage_trip_s + rest_s)
            if terms.is_single:
                forward_s, backward_s = terms.forward_s[index], terms.backward_s[index]
                back_s = link_trip_s + rest_trip_s
                if m > w:
                    idle_s = np.maximum(0.0, back_s - (w - 1) * forward_s)
                    idle_s = idle_s + np.maximum(0.0, back_s - (w - 1) * backward_s)
                else:
                    idle_s = np.maximum(0.0, back_s - (m - 1) * np.minimum(forward_s, backward_s))
                trip_s = stage_trip_s + rest_trip_s
                waits_s = np.maximum(busy_s + idle_s, -(-m // min(w, m)) * trip_s)
                waits_s = np.maximum(waits_s, (m - 1) * terms.link_s + trip_s)
                found = np.maximum(found, np.where(terms.comes_back[index] > 0, waits_s, 0.0))
        return np.where(np.isnan(found), np.inf, found)

    def terms(self, layout: Layout, k: int) -> StageTerms:
        """Seconds of stage k of a layout for all (start, end)."""
        group = layout[k]
        below: Group = layout[k + 1] if k + 1 < len(layout) else ()
        window = sum(map(len, layout[k:])) + ahead_of(layout, k, runs_ahead=self._pricer.shape.runs_ahead)
        before = len(layout[k - 1]) if k > 0 else 0
        key = (group, below, window, before, len(layout) if self._pricer.shape.generate_rows else int(k == 0))
        if key not in self._terms:
            self._terms[key] = self._make_terms(layout, k, window)
        return self._terms[key]

    def _make_terms(self, layout: Layout, k: int, window: int) -> StageTerms:
        pricer, group = self._pricer, layout[k]
        below: Group = layout[k + 1] if k + 1 < len(layout) else ()
        owners = pricer.owners(group)
        is_last = not below
        fits = np.zeros_like(self._is_stage)
        forward_s, backward_s = np.full(fits.shape, np.inf), np.full(fits.shape, np.inf)
        busy_s = np.full(fits.shape, np.inf)
        stage = pricer.places(layout)[k]
        possible = self._is_stage & ((self._ends == pricer.table.num_blocks) == is_last)
        possible &= (self._starts == 0) == (k == 0)
        for choice in pricer.choices:
            now = possible & ~fits
            for place, room in zip(stage.places, stage.room_bytes, strict=True):
                now &= self._job_bytes(place, choice) <= room
            for r, device in enumerate(group):
                f, b = self._stage_seconds(device, choice)
                if r == 0:
                    busy_s[now], forward_s[now], backward_s[now] = 0.0, f[now], b[now]
                forward_s[now] = np.minimum(forward_s, f)[now]
                backward_s[now] = np.minimum(backward_s, b)[now]
                busy_s[now] = np.maximum(busy_s, owners.count(r) * (f + b))[now]
            fits |= now
        num_trained = self._ends - np.maximum(self._starts, np.minimum(pricer.shape.first_trainable_block, self._ends))
        trains_head = is_last and pricer.shape.last_trainable_params > 0
        gets_gradient = (num_trained > 0) & (not is_last)
        comes_back = (num_trained > 0) | trains_head
        link_s, latency_s = self._quickest_link(group, below)
        link_trip_s = np.where(gets_gradient, 2, 1) * (link_s + latency_s)
        return StageTerms(
            forward_s=forward_s,
            backward_s=backward_s,
            busy_s=busy_s,
            trip_s=forward_s + backward_s + link_trip_s,
            link_trip_s=link_trip_s,
            comes_back=comes_back.astype(float),
            sum_s=pricer.least_sum_s(layout, k, self._starts, self._ends),
            link_s=link_s if len(group) == len(below) == 1 else 0.0,
            window=window,
            is_single=len(group) == 1,
        )

    def _quickest_link(self, group: Group, below: Group) -> tuple[float, float]:
        if not below:
            return 0.0, 0.0
        busy_s = self._pricer.least_busy_s[np.ix_(group, below)]
        latency_s = self._pricer.latency_s[np.ix_(group, below)]
        return float(busy_s.min()), float(latency_s.min())

    def _job_bytes(self, place: Place, choice: bool) -> Floats:
        key = (place, choice)
        if key not in self._bytes:
            memory = self._pricer.memory
            self._bytes[key] = memory.bytes_of(self._starts, self._ends, place, checkpointing=choice).astype(float)
        return self._bytes[key]

    def _stage_seconds(self, device: int, choice: bool) -> tuple[Floats, Floats]:
        """Forward and backward seconds for all (start, end) on a device."""
        key = (device, choice)
        if key not in self._seconds:
            pricer, starts, ends = self._pricer, self._starts, self._ends
            timings, shape = pricer.devices[device].timings, pricer.shape
            is_first, is_last = starts == 0, ends == pricer.table.num_blocks
            num_trained = ends - np.maximum(starts, np.minimum(shape.first_trainable_block, ends))
            forward_s, backward_s = blocks_s(pricer.table, shape, timings, starts, ends, checkpointing=choice)
            forward_s = forward_s + is_first * shape.frozen_share * timings.embedding_s
            forward_s = forward_s + is_last * timings.head_forward_s
            goes_back = is_last & ((num_trained > 0) | (shape.last_trainable_params > 0))
            self._seconds[key] = forward_s, backward_s + goes_back * timings.head_backward_s
        return self._seconds[key]
