"""Quick guesses for many layouts at once: where to cut, and how long a step would take.

Entry point: :class:`Estimator`. The search of a large fleet looks at thousands of layouts; only the best guesses are
cut and replayed exactly. A guess treats a stage's seconds as linear in its blocks (in their work, where an
encoder-decoder's halves differ) and its memory as a largest number of blocks for its place in the pipeline. For each of
several paces (seconds of the slowest stage for one micro-batch) the blocks go to the fastest devices first, up to what
pace and memory allow; the pace with the shortest step wins. Seconds of a step come from the terms of
:mod:`partitioner.bounds`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from partitioner.block_seconds import by_block, mean_block
from partitioner.layout import Cuts, Group, Layout
from partitioner.place import Ints, Place
from partitioner.pricing import Pricer

Floats = npt.NDArray[np.floating[Any]]
"""Single precision: guesses need no more, and twice as many fit a cache line."""

_PACES = np.array([1.03, 1.08, 1.17, 1.4, 1.9, np.inf], dtype=np.float32)
"""Paces tried, as multiples of the one at which all devices would be equally busy."""


@dataclass(slots=True)
class _GroupNumbers:
    """Seconds of a group for one micro-batch of the step: the busiest replica's total divided by the micro-batches."""

    forward_s: float
    backward_s: float
    recompute_s: float
    embedding_s: float
    head_forward_s: float
    head_backward_s: float
    trip_share: float
    """Seconds of one micro-batch on its way, over those above."""
    sum_s: float
    """Seconds a block adds to the replicas' sum."""
    size: float


@dataclass(frozen=True, slots=True, eq=False)
class Guess:
    """The best guess for one layout."""

    step_s: float
    """Infinite where memory seems too small. Where a job has steps from a cache, the mean over all."""
    lacking_blocks: float
    """Blocks that seem to fit nowhere."""
    borders: Floats
    """Of the blocks; behind the layout's own they repeat. Few guesses are ever cut, so they stay an array."""
    num_stages: int

    @property
    def cuts(self) -> Cuts:
        """Wanted, not checked against any budget."""
        return tuple(int(border) for border in self.borders[: self.num_stages + 1])


class Estimator:
    """Guesses for layouts of one job on one fleet."""

    def __init__(self, pricer: Pricer) -> None:
        self._pricer = pricer
        self._index: dict[Group, int] = {}
        self._numbers: list[_GroupNumbers] = []
        self._members: list[Floats] = []
        num_devices = len(pricer.devices)
        self._max_window = min(num_devices, pricer.num_micro_batches)
        self._caps: list[Ints] = []
        self._device_caps = self._caps_of_devices()
        self._arrays: dict[str, Floats] = {}
        self._cap_array: Ints = np.zeros(0, dtype=np.int64)
        self._member_array: Floats = np.zeros(0)
        self._trained_share = 1.0 - pricer.shape.first_trainable_block / pricer.table.num_blocks
        self._run_share = self._trained_share + pricer.shape.frozen_share * (1.0 - self._trained_share)
        """Mean share of the steps in which a block runs."""
        self._work_below = self._work_of_halves() if pricer.table.num_encoder_blocks else None
        """[num_blocks + 1], work of the blocks below each border, in mean blocks; None: every block is one."""

    def _work_of_halves(self) -> Floats:
        """As a mean over the devices."""
        table, timings = self._pricer.table, [device.timings for device in self._pricer.devices]
        seconds = [by_block(table, one.block.both_ways_s, one.decoder_block.both_ways_s) for one in timings]
        work = np.mean([of_device / of_device.mean() for of_device in seconds], axis=0)
        return np.concatenate([[0.0], np.cumsum(work)]).astype(np.float32)

    def _caps_of_devices(self) -> Ints:
        """[device, micro-batches in flight, is first + 2 * is last, checkpointing] -> blocks that fit."""
        pricer, num_blocks = self._pricer, self._pricer.table.num_blocks
        rooms = np.array(pricer.room_bytes)
        caps = np.zeros((len(rooms), self._max_window + 1, 4, 2), dtype=np.int64)
        has_several = int(pricer.num_micro_batches > 1)
        starts, in_flight = np.arange(num_blocks), np.arange(1, self._max_window + 1)[:, None]
        for kind in range(4):
            is_first, is_last = bool(kind & 1), bool(kind & 2)
            place = Place(3, is_first, is_last, in_flight, has_several, 2 - is_first - is_last)
            # From the end for the last stage; behind the frozen blocks, which keep less, for those in the middle.
            start = 0 if is_first else min(num_blocks - 1, pricer.shape.first_trainable_block)
            for choice in pricer.choices:
                if is_last:
                    sizes = pricer.memory.bytes_of(starts, np.asarray(num_blocks), place, checkpointing=choice)[:, ::-1]
                else:
                    ends = starts[start:] + 1
                    sizes = pricer.memory.bytes_of(np.asarray(start), ends, place, checkpointing=choice)
                for row, of_window in enumerate(sizes, start=1):
                    caps[:, row, kind, int(choice)] = np.searchsorted(of_window, rooms, side="right")
        return caps

    def _register(self, group: Group) -> None:
        pricer, m = self._pricer, self._pricer.num_micro_batches
        owners = pricer.owners(group)
        counts = [owners.count(r) for r in range(len(group))]
        timings = [pricer.devices[device].timings for device in group]
        busiest = max(range(len(group)), key=lambda r: counts[r] * pricer.block_s[group[r]])
        share = counts[busiest] / m
        own = timings[busiest]
        block = mean_block(pricer.table, own)
        mean_s = sum(n * pricer.block_s[d] for n, d in zip(counts, group, strict=True)) / m
        layout: Layout = (group, group) if len(group) > 1 else ((group),)
        blocks = np.arange(pricer.table.num_blocks)
        sum_s = float(pricer.least_sum_s(layout, 0, blocks, blocks + 1).mean()) if len(group) > 1 else 0.0
        self._numbers.append(
            _GroupNumbers(
                forward_s=share * block.forward_s,
                backward_s=share * block.backward_s,
                recompute_s=share * block.recompute_s,
                embedding_s=share * own.embedding_s,
                head_forward_s=share * own.head_forward_s,
                head_backward_s=share * own.head_backward_s,
                trip_share=mean_s / max(share * pricer.block_s[group[busiest]], 1e-12),
                sum_s=sum_s,
                size=float(len(group)),
            )
        )
        members = np.zeros(len(pricer.devices))
        members[list(group)] = [n / m for n in counts]
        self._members.append(members)
        self._caps.append(self._group_caps(group, owners))
        self._index[group] = len(self._index)

    def _group_caps(self, group: Group, owners: tuple[int, ...]) -> Ints:
        """[window, kind, checkpointing] -> blocks that fit all replicas."""
        windows = np.arange(len(self._pricer.devices) + 1)
        caps: Ints | None = None
        for replica, device in enumerate(group):
            # A replica's share of any window, but for the luck of where the window begins.
            count = owners.count(replica)
            held = np.minimum(np.maximum(np.minimum(count, -(-windows * count // len(owners))), 1), self._max_window)
            of_one = self._device_caps[device, held]
            caps = of_one if caps is None else np.minimum(caps, of_one)
        assert caps is not None, "a group has a device"
        caps[0] = 0
        return caps

    def _refresh(self) -> None:
        if len(self._cap_array) == len(self._caps):
            return
        for name in (field.name for field in fields(_GroupNumbers)):
            self._arrays[name] = np.array([getattr(numbers, name) for numbers in self._numbers], dtype=np.float32)
        self._cap_array = np.array(self._caps)
        self._member_array = np.array(self._members, dtype=np.float32)

    def guesses(self, layouts: Sequence[Layout]) -> list[Guess]:
        """One guess for every layout; an infinite step where memory seems too small."""
        index = self._index
        for layout in layouts:
            for group in layout:
                if group not in index:
                    self._register(group)
        self._refresh()
        lengths = [len(layout) for layout in layouts]
        num_stages = np.array(lengths)
        order = np.zeros((len(layouts), max(lengths)), dtype=np.int64)
        order[np.arange(order.shape[1]) < num_stages[:, None]] = [index[g] for layout in layouts for g in layout]
        step_s, lacking, cuts = self._evaluate(order, num_stages)
        best = step_s.argmin(axis=1)
        rows = np.arange(len(layouts))
        chosen = zip(step_s[rows, best].tolist(), lacking.tolist(), cuts[rows, best], lengths, strict=True)
        return [Guess(*values) for values in chosen]

    def _evaluate(self, order: Ints, num_stages: Ints) -> tuple[Floats, Floats, Floats]:
        """Step seconds (N, paces), lacking blocks (N) and cuts (N, paces, stages + 1), padded to one number of stages.

        Where something is lacking all seconds are infinite.
        """
        num_blocks, width = self._pricer.table.num_blocks, order.shape[1]
        stages = np.arange(width)
        is_stage = stages < num_stages[:, None]
        is_first, is_last = stages == 0, stages == num_stages[:, None] - 1
        a = {name: values[order] for name, values in self._arrays.items()}
        sizes = np.where(is_stage, a["size"], 0)
        window = np.cumsum(sizes[:, ::-1], axis=1)[:, ::-1].astype(np.int64)
        kind = is_first + 2 * is_last
        caps = self._cap_array[order, window, kind].astype(np.float32)
        block_s = self._run_share * a["forward_s"] + self._trained_share * a["backward_s"]
        slow_block_s = block_s + self._trained_share * a["recompute_s"]
        fixed_s = is_first * a["embedding_s"] + is_last * (a["head_forward_s"] + a["head_backward_s"])
        # Pace 1: all stages equally busy, were there no budgets and no whole blocks.
        rate = np.where(is_stage, 1.0 / block_s, 0.0)
        even_s = (num_blocks + np.where(is_stage, fixed_s * rate, 0.0).sum(axis=1)) / rate.sum(axis=1)
        pace_s = even_s[:, None] * _PACES
        most = self._most_blocks(pace_s[:, :, None], fixed_s, block_s, slow_block_s, caps)
        most = np.where(is_stage[:, None, :], most, 0.0)
        fits = (most >= 1).sum(axis=2) == num_stages[:, None]
        fits &= most.sum(axis=2) >= num_blocks
        counts = self._fill(most, block_s, is_stage, (num_blocks - num_stages).astype(np.float32))
        cuts = np.zeros((*counts.shape[:2], width + 1), dtype=np.float32)
        np.cumsum(counts, axis=2, out=cuts[:, :, 1:])
        np.minimum(cuts, num_blocks, out=cuts)
        if self._work_below is not None:
            cuts = self._at_work(cuts, self._work_below, num_stages, np.where(is_stage, caps.max(axis=2), np.inf))
        step_s = self._step_s(order, num_stages, a, cuts, caps, window, is_stage, is_first, is_last)
        # The last pace is infinite: what memory alone allows.
        held = most[:, -1]
        lacking = np.maximum(0, num_blocks - held.sum(axis=1)) + (is_stage & (held < 1)).sum(axis=1)
        return np.where(fits, step_s, np.inf), lacking, cuts

    @staticmethod
    def _most_blocks(pace_s: Floats, fixed_s: Floats, block_s: Floats, slow_block_s: Floats, caps: Ints) -> Floats:
        """Blocks that each stage can take at a pace, (N, paces, stages)."""
        spare_s = pace_s - fixed_s[:, None, :]
        quick = np.minimum(np.floor(spare_s / block_s[:, None, :]), caps[:, None, :, 0])
        slow = np.minimum(np.floor(spare_s / slow_block_s[:, None, :]), caps[:, None, :, 1])
        # One block is the least that a stage can have, however slow it makes the step.
        found: Floats = np.maximum(np.maximum(quick, slow), np.minimum(1, caps.max(axis=2)[:, None, :]))
        return found

    @staticmethod
    def _at_work(cuts: Floats, work_below: Floats, num_stages: Ints, most: Floats) -> Floats:
        """Borders that deal out the work that the wanted ones deal out in blocks; the wanted ones where one lacks room.

        Args:
            cuts: (N, paces, stages + 1), wanted as if every block were a mean one.
            work_below: of the blocks below each border.
            num_stages: (N).
            most: blocks that fit each stage, (N, stages).
        """
        num_blocks = len(work_below) - 1
        borders = np.rint(np.interp(cuts, work_below, np.arange(num_blocks + 1)))
        # At least a block a stage.
        places = np.minimum(np.arange(cuts.shape[2]), num_stages[:, None])[:, None, :]
        spare = np.minimum(np.maximum.accumulate(borders - places, axis=2), (num_blocks - num_stages)[:, None, None])
        borders = (spare + places).astype(np.float32)
        fits = np.all(np.diff(borders, axis=2) <= most[:, None, :], axis=2, keepdims=True)
        found: Floats = np.where(fits, borders, cuts)
        return found

    def _work(self, cuts: Floats | Ints) -> Floats:
        """Mean blocks that the stages between borders compute."""
        found: Floats = np.diff(cuts if self._work_below is None else self._work_below[cuts.astype(np.int64)], axis=2)
        return found

    @staticmethod
    def _fill(most: Floats, block_s: Floats, is_stage: npt.NDArray[np.bool_], num_spare: Floats) -> Floats:
        """One block each, the others to the fastest stages first, up to what each can take."""
        ranks = np.argsort(np.where(is_stage, block_s, np.inf), axis=1)[:, None, :]
        room = np.take_along_axis(np.maximum(most - 1, 0), np.broadcast_to(ranks, most.shape), axis=2)
        before = np.cumsum(room, axis=2) - room
        taken = np.clip(num_spare[:, None, None] - before, 0, room)
        counts = np.empty_like(taken)
        np.put_along_axis(counts, np.broadcast_to(ranks, most.shape), taken, axis=2)
        found: Floats = np.where(is_stage[:, None, :], counts + 1, 0.0)
        return found

    def _step_s(
        self,
        order: Ints,
        num_stages: Ints,
        a: dict[str, Floats],
        cuts: Ints,
        caps: Ints,
        window: Ints,
        is_stage: npt.NDArray[np.bool_],
        is_first: npt.NDArray[np.bool_],
        is_last: npt.NDArray[np.bool_],
    ) -> Floats:
        pricer, m = self._pricer, self._pricer.num_micro_batches
        first_trained = pricer.shape.first_trainable_block
        counts = np.diff(cuts, axis=2)
        work, trained = self._work(cuts), self._work(np.maximum(cuts, first_trained))
        recomputes = counts > caps[:, None, :, 0]
        a = {name: values[:, None, :] for name, values in a.items()}
        first, last, stage = is_first[None, None, :], is_last[:, None, :], is_stage[:, None, :]
        frozen_share = pricer.shape.frozen_share
        num_run = trained + frozen_share * (work - trained)
        f = num_run * a["forward_s"] + first * frozen_share * a["embedding_s"] + last * a["head_forward_s"]
        b = trained * (a["backward_s"] + recomputes * a["recompute_s"])
        has_back = (trained > 0) | (last & (pricer.shape.last_trainable_params > 0))
        b = b + (last & has_back) * a["head_backward_s"]
        f, b = np.where(stage, f, 0.0), np.where(stage, b, 0.0)
        link_s, latency_s = self._links(order, num_stages)
        gets = (trained > 0) & ~last & stage
        ways = np.where(gets, np.float32(2), np.float32(1))
        link_trip = ways * (link_s + latency_s)[:, None, :]
        trip = (f + b) * a["trip_share"] + link_trip
        upto = np.cumsum(trip, axis=2)
        before, behind = upto - trip, upto[:, :, -1:] - upto
        back = link_trip + behind
        w = window[:, None, :].astype(np.float32)
        ahead = np.maximum(0, np.minimum(w, m) - np.maximum(a["size"], 1))
        idle_first = np.maximum(0.0, back - ahead * f)
        idle_last = np.maximum(0.0, back - ahead * b)
        idle = np.where(m > w, idle_first + idle_last, np.maximum(idle_first, idle_last))
        turns = np.ceil(m / np.clip(w, 1, m))
        own = m * (f + b) + np.where(has_back, idle, 0.0)
        own = np.maximum(own, np.where(has_back, turns * (trip + behind), 0.0))
        own = np.maximum(own, (m - 1) * link_s[:, None, :] + trip + behind)
        own = own + counts * a["sum_s"]
        found: Floats = np.where(stage, before + own, 0.0).max(axis=2)
        return found

    def _links(self, order: Ints, num_stages: Ints) -> tuple[Floats, Floats]:
        """Mean seconds on the link behind each stage, (N, stages); 0 behind the last."""
        busy_s: Floats = np.zeros(order.shape, np.float32)
        latency_s: Floats = np.zeros(order.shape, np.float32)
        if order.shape[1] > 1:
            here, below = self._member_array[order[:, :-1]], self._member_array[order[:, 1:]]
            exists = np.arange(order.shape[1] - 1) < num_stages[:, None] - 1
            for found, matrix in ((busy_s, self._pricer.busy_s), (latency_s, self._pricer.latency_s)):
                means = np.einsum("nsd,nsd->ns", here @ matrix.astype(np.float32), below)
                found[:, :-1] = np.where(exists, means, 0.0)
        return busy_s, latency_s
