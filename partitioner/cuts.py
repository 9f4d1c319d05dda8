"""Which devices, in which order, with which blocks: the plan with the shortest predicted step that fits the budgets.

Keeps the shape of PAC's planner (arXiv:2408.10746 sect. 5.1), dynamic programming over blocks x ordered devices, and
mends what it leaves out: links stand inside the recurrence, the bottleneck is the slowest stage and not the last, the
order of the devices is searched, and memory depends on a stage's place in the 1F1B pipeline.

The dynamic program bounds every order's step time from below. Orders are then opened in the order of their bounds: the
cuts of the best bound are improved step by step against an exact replay (:mod:`partitioner.cost`), and the others
enumerated by branch and bound until no bound is left below the best replay. The answer is exact unless the allowance of
work runs out, which :class:`SearchResult` tells.

Entry points: :class:`CutSearch`, and :func:`fits` where only feasibility matters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile

from partitioner.cost import (
    BoundTerms,
    StageCost,
    StepTime,
    bound_terms,
    num_turns,
    pipeline_step_time,
    stage_cost,
    step_lower_bound,
)
from partitioner.device import DeviceProfile, LinkTable
from partitioner.memory import MemoryModel
from partitioner.model import JobShape, ModelTable
from partitioner.orders import Order, device_orders

_MAX_WORK = 1_500_000
"""Allowance of one search, in forward and backward passes replayed and stages bounded: a few seconds, as PAC's planner
takes. A count and not a clock, so that the same inputs always give the same plan."""

_MAX_ORDER_WORK = 20_000
"""Share of one device order, so that one whose bound is loose cannot eat the others' allowance."""

_TOLERANCE = 1e-9
"""Relative; a plan must beat another by more than rounding."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A complete assignment with its replayed step."""

    order: Order
    cuts: tuple[int, ...]
    """Block borders: stage k holds blocks ``[cuts[k], cuts[k + 1])``."""
    checkpointing: bool
    costs: tuple[StageCost, ...]
    time: StepTime

    @property
    def step_s(self) -> float:
        """Predicted seconds of one optimiser step."""
        return self.time.step_s


@dataclass(frozen=True, slots=True)
class _Option:
    """One way to go on: the next stage ends here."""

    end: int
    cost: StageCost
    terms: BoundTerms


@dataclass(frozen=True, slots=True)
class SearchResult:
    """The best candidate and what was seen on the way."""

    best: Candidate | None
    best_by_num_stages: dict[int, Candidate | None]
    """Fastest candidate that was opened for each number of stages; None: none fits, or none can win."""
    is_exact: bool
    """False if the allowance ran out before every bound was settled."""


class CutSearch:
    """Searches cuts for one job on one fleet, with checkpointing on or off.

    Args:
        table: the model.
        shape: the job.
        devices: devices that may be used.
        links: links between them.
        checkpointing: whether blocks are recomputed.
    """

    def __init__(
        self,
        table: ModelTable,
        shape: JobShape,
        devices: Sequence[DeviceProfile],
        links: LinkTable,
        *,
        checkpointing: bool,
    ) -> None:
        self._table = table
        self._shape = shape
        self._devices = devices
        self._links = links
        self._checkpointing = checkpointing
        self._memory = MemoryModel(table, shape)
        self._job_bytes: dict[tuple[int, int, int, int], int] = {}
        self._options: dict[tuple[int, int | None, int], list[_Option]] = {}
        self._num_fitting: dict[tuple[int, int, int, int], int] = {}
        self._turns = [num_turns(shape.num_micro_batches, n) for n in range(max(1, len(devices)))]
        self._bounds: dict[tuple[int, Order], tuple[list[float], list[float]]] = {}
        self._room_bytes = [device.available_bytes - device.baseline_bytes for device in devices]
        self._limit_s = math.inf

    def run(self, *, limit_s: float = math.inf) -> SearchResult:
        """The fastest candidate whose step takes less than ``limit_s``."""
        self._limit_s = limit_s
        self._bounds.clear()
        best: Candidate | None = None
        best_by_num_stages: dict[int, Candidate | None] = {}
        is_exact = True
        for num_stages in self._stage_counts():
            best_by_num_stages[num_stages] = None
            work_left = _MAX_WORK // len(self._stage_counts())
            bounded = [(self._bound_s(num_stages, order), order) for order in self._orders(num_stages)]
            for bound_s, order in sorted(bounded):
                if not self._beats_limit(bound_s):
                    break
                if work_left <= 0:
                    is_exact = False
                    break
                found, used, was_settled = self._open(num_stages, order, min(_MAX_ORDER_WORK, work_left))
                work_left -= used
                is_exact = is_exact and was_settled
                if found is not None:
                    best = best_by_num_stages[num_stages] = found
        return SearchResult(best, best_by_num_stages, is_exact)

    def fits(self) -> bool:
        """Whether any assignment keeps every device within its budget."""
        self._limit_s = math.inf
        self._bounds.clear()
        return any(
            self._bound_s(num_stages, order) < math.inf
            for num_stages in self._stage_counts()
            for order in self._orders(num_stages)
        )

    def _stage_counts(self) -> Sequence[int]:
        largest = min(len(self._devices), self._table.num_blocks)
        wanted = self._shape.exact_stages
        if wanted is None:
            return range(1, largest + 1)
        return [wanted] if wanted <= largest else []

    def _orders(self, num_stages: int) -> list[Order]:
        return device_orders(self._devices, self._links, num_stages)

    def _bound_s(self, num_stages: int, order: Order) -> float:
        return self._suffix_bounds(num_stages, order)[0][0]

    def _suffix_bounds(self, num_stages: int, suffix: Order) -> tuple[list[float], list[float]]:
        """For every block a: bound of the step, and of one round trip, when ``suffix`` holds blocks [a, end).

        Infinite where the suffix cannot hold them or cannot beat the limit.
        """
        key = (num_stages, suffix)
        if key in self._bounds:
            return self._bounds[key]
        num_blocks = self._table.num_blocks
        bounds_s, round_trips_s = [math.inf] * (num_blocks + 1), [math.inf] * (num_blocks + 1)
        if suffix:
            rest_bounds_s, rest_round_trips_s = self._suffix_bounds(num_stages, suffix[1:])
            stage_index, turns = num_stages - len(suffix), self._turns[len(suffix) - 1]
            for start in range(stage_index, num_blocks) if stage_index else (0,):
                for option in self._stages(num_stages, suffix, start):
                    rest_bound_s, rest_round_trip_s = rest_bounds_s[option.end], rest_round_trips_s[option.end]
                    if rest_bound_s == math.inf:
                        continue
                    bound_s = step_lower_bound(option.terms, rest_bound_s, rest_round_trip_s, turns)
                    bounds_s[start] = min(bounds_s[start], bound_s)
                    round_trip_s = option.terms.round_trip_s + rest_round_trip_s
                    round_trips_s[start] = min(round_trips_s[start], round_trip_s)
        else:
            bounds_s[num_blocks] = round_trips_s[num_blocks] = 0.0
        self._bounds[key] = bounds_s, round_trips_s
        return bounds_s, round_trips_s

    def _stages(self, num_stages: int, suffix: Order, start: int) -> Iterator[_Option]:
        """What the first device of ``suffix`` can take from ``start`` on, while it fits and can still win."""
        for option in self._fitting(num_stages, suffix, start):
            if option.terms.busy_s >= self._limit_s:
                return  # more blocks only take longer
            yield option

    def _fitting(self, num_stages: int, suffix: Order, start: int) -> list[_Option]:
        """What the first device of ``suffix`` can take within its budget."""
        next_index = suffix[1] if len(suffix) > 1 else None
        options_key = (suffix[0], next_index, start)
        if options_key not in self._options:
            self._options[options_key] = self._make_options(*options_key)
        options = self._options[options_key]
        stage_index = num_stages - len(suffix)
        fitting_key = (num_stages, stage_index, suffix[0], start)
        if fitting_key not in self._num_fitting:
            # Every stage behind needs a block of its own; more blocks only take more memory.
            last_end = self._table.num_blocks - (len(suffix) - 1)
            fitting = takewhile(
                lambda option: (
                    option.end <= last_end
                    and self._stage_bytes(num_stages, stage_index, start, option.end) <= self._room_bytes[suffix[0]]
                ),
                options,
            )
            self._num_fitting[fitting_key] = sum(1 for _ in fitting)
        return options[: self._num_fitting[fitting_key]]

    def _make_options(self, device_index: int, next_index: int | None, start: int) -> list[_Option]:
        """Stages from ``start`` on, whatever they weigh; the last stage takes all that is left."""
        num_blocks, num_micro_batches = self._table.num_blocks, self._shape.num_micro_batches
        is_last = next_index is None
        options = []
        for end in (num_blocks,) if is_last else range(start + 1, num_blocks):
            cost = self._cost(device_index, next_index, start, end)
            options.append(_Option(end, cost, bound_terms(cost, num_micro_batches, is_last=is_last)))
        return options

    def _cost(self, device_index: int, next_index: int | None, start: int, end: int) -> StageCost:
        device = self._devices[device_index]
        return stage_cost(
            self._table,
            self._shape,
            device,
            start_block=start,
            end_block=end,
            checkpointing=self._checkpointing,
            link=None if next_index is None else self._links.between(device, self._devices[next_index]),
        )

    def _stage_bytes(self, num_stages: int, stage_index: int, start: int, end: int) -> int:
        key = (num_stages, stage_index, start, end)
        if key not in self._job_bytes:
            self._job_bytes[key] = self._memory.job_bytes(
                start, end, num_stages=num_stages, stage_index=stage_index, checkpointing=self._checkpointing
            )
        return self._job_bytes[key]

    def _open(self, num_stages: int, order: Order, allowance: int) -> tuple[Candidate | None, int, bool]:
        """Branch and bound over the cuts of one order, lowering the limit with every candidate found.

        Returns:
            The best candidate below the limit, the work done, and whether all cuts were settled.
        """
        replay_work = 2 * num_stages * self._shape.num_micro_batches
        best: Candidate | None = None
        work = 0
        # Depth first, the most promising branch on top: the first leaf is already near the best.
        branches: list[tuple[float, tuple[_Option, ...]]] = [(0.0, ())]
        while branches:
            bound_s, taken = branches.pop()
            if not self._beats_limit(bound_s):
                continue
            if len(taken) < num_stages:
                rest = order[len(taken) :]
                children = []
                for option in self._stages(num_stages, rest, taken[-1].end if taken else 0):
                    work += num_stages
                    child = (*taken, option)
                    child_bound_s = self._completed_bound_s(num_stages, order, child)
                    if self._beats_limit(child_bound_s):
                        children.append((child_bound_s, child))
                branches += sorted(children, key=lambda child: child[0], reverse=True)
                continue
            work += replay_work
            cuts = (0, *(option.end for option in taken))
            found = self._replayed(order, cuts, tuple(option.cost for option in taken))
            if found is not None:
                best, num_replays = self._climbed(found)
                work += num_replays * replay_work
            if work >= allowance and branches:
                return best, work, False
        return best, work, True

    def _replayed(self, order: Order, cuts: tuple[int, ...], costs: tuple[StageCost, ...]) -> Candidate | None:
        """A candidate if it beats the limit, which it then sets."""
        time = pipeline_step_time(costs, self._shape.num_micro_batches)
        if not self._beats_limit(time.step_s):
            return None
        self._limit_s = time.step_s
        return Candidate(order, cuts, self._checkpointing, costs, time)

    def _climbed(self, candidate: Candidate) -> tuple[Candidate, int]:
        """Move one cut by one block as long as that helps; the candidate reached and the replays it took."""
        num_replays = 0
        is_better = True
        while is_better:
            is_better = False
            for k in range(1, len(candidate.order)):
                for shift in (-1, 1):
                    cuts = (*candidate.cuts[:k], candidate.cuts[k] + shift, *candidate.cuts[k + 1 :])
                    costs = self._fitting_costs(candidate.order, cuts)
                    if costs is None:
                        continue
                    num_replays += 1
                    found = self._replayed(candidate.order, cuts, costs)
                    if found is not None:
                        candidate, is_better = found, True
        return candidate, num_replays

    def _fitting_costs(self, order: Order, cuts: tuple[int, ...]) -> tuple[StageCost, ...] | None:
        """Costs of the stages of some cuts; None if one is empty or does not fit its device."""
        num_stages = len(order)
        costs = []
        for k, (start, end) in enumerate(pairwise(cuts)):
            if start >= end or self._stage_bytes(num_stages, k, start, end) > self._room_bytes[order[k]]:
                return None
            costs.append(self._cost(order[k], order[k + 1] if k + 1 < num_stages else None, start, end))
        return tuple(costs)

    def _beats_limit(self, step_s: float) -> bool:
        return step_s < self._limit_s * (1 - _TOLERANCE)

    def _completed_bound_s(self, num_stages: int, order: Order, taken: tuple[_Option, ...]) -> float:
        """Bound of the step when the first stages are settled and the others are at their best."""
        bounds_s, round_trips_s = self._suffix_bounds(num_stages, order[len(taken) :])
        bound_s, round_trip_s = bounds_s[taken[-1].end], round_trips_s[taken[-1].end]
        for num_behind, option in enumerate(reversed(taken), start=num_stages - len(taken)):
            bound_s = step_lower_bound(option.terms, bound_s, round_trip_s, self._turns[num_behind])
            round_trip_s += option.terms.round_trip_s
        return bound_s


def checkpointing_choices(shape: JobShape) -> tuple[bool, ...]:
    """Whether blocks may be recomputed, the cheaper choice first."""
    return {"on": (True,), "off": (False,), "auto": (False, True)}[shape.checkpointing]


def fits(table: ModelTable, shape: JobShape, devices: Sequence[DeviceProfile], links: LinkTable) -> bool:
    """Whether any plan keeps every device within its budget."""
    usable = [device for device in devices if shape.dtype in device.dtypes]
    return any(
        CutSearch(table, shape, usable, links, checkpointing=choice).fits() for choice in checkpointing_choices(shape)
    )
