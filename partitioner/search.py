"""Which devices, in which order, with which blocks: the plan with the shortest predicted step that fits the budgets.

Keeps the shape of PAC's planner (arXiv:2408.10746 sect. 5.1), dynamic programming over blocks x ordered devices, and
mends what it leaves out: links stand inside the recurrence, the bottleneck is the slowest stage and not the last, the
order of the devices is searched, and memory depends on a stage's place in the 1F1B pipeline.

The dynamic program bounds every order's step time from below. Orders are then opened in the order of their bounds, and
their cuts enumerated by branch and bound against an exact replay of the step (:mod:`partitioner.cost`), until no bound
is left below the best replay. The answer is exact unless the replay allowance runs out, and the plan says so if it did.

Entry points: :func:`search`, and :func:`fits` where only feasibility matters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from partitioner.cost import StageCost, StepTime, extend_lower_bound, pipeline_step_time, stage_cost
from partitioner.device import DeviceProfile, LinkTable
from partitioner.memory import MemoryModel
from partitioner.model import JobShape, ModelTable
from partitioner.orders import Order, device_orders

_MAX_ACTIONS = 3_000_000
"""Allowance of one search in replayed forward and backward passes: about three seconds, as PAC's planner takes."""

_MAX_ORDER_ACTIONS = 60_000
"""Share of one device order, so that an order whose bound is loose cannot eat the others' allowance."""

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
        return self.time.step_s


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
        self._costs: dict[tuple[int, int | None, int, int], StageCost] = {}
        self._bounds: dict[tuple[int, Order], tuple[list[float], list[float]]] = {}
        self._limit_s = math.inf

    def run(self, *, limit_s: float = math.inf) -> SearchResult:
        """The fastest candidate whose step takes less than ``limit_s``."""
        self._limit_s = limit_s
        best: Candidate | None = None
        best_by_num_stages: dict[int, Candidate | None] = {}
        spent, is_exact = 0, True
        for num_stages in self._stage_counts():
            best_by_num_stages[num_stages] = None
            bounded = [(self._bound_s(num_stages, order), order) for order in self._orders(num_stages)]
            for bound_s, order in sorted(bounded):
                if bound_s >= self._limit_s * (1 - _TOLERANCE):
                    break
                allowance = min(_MAX_ORDER_ACTIONS, _MAX_ACTIONS - spent)
                found, used, was_settled = self._open(num_stages, order, allowance)
                spent += used
                is_exact = is_exact and was_settled
                if found is not None:
                    best = best_by_num_stages[num_stages] = found
                    self._limit_s = found.step_s
        return SearchResult(best, best_by_num_stages, is_exact)

    def fits(self) -> bool:
        """Whether any assignment keeps every device within its budget."""
        self._limit_s = math.inf
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
            stage_index = num_stages - len(suffix)
            for start in range(stage_index, num_blocks) if stage_index else (0,):
                for end, cost in self._stages(num_stages, suffix, start):
                    bound_s, round_trip_s = extend_lower_bound(
                        cost,
                        rest_bounds_s[end],
                        rest_round_trips_s[end],
                        num_micro_batches=self._shape.num_micro_batches,
                        num_behind=len(suffix) - 1,
                    )
                    bounds_s[start] = min(bounds_s[start], bound_s)
                    round_trips_s[start] = min(round_trips_s[start], round_trip_s)
        else:
            bounds_s[num_blocks] = round_trips_s[num_blocks] = 0.0
        self._bounds[key] = bounds_s, round_trips_s
        return bounds_s, round_trips_s

    def _stages(self, num_stages: int, suffix: Order, start: int) -> Iterator[tuple[int, StageCost]]:
        """Ends that the first device of ``suffix`` can take from ``start`` on, while it fits and can still win."""
        num_blocks, num_behind = self._table.num_blocks, len(suffix) - 1
        device = self._devices[suffix[0]]
        room_bytes = device.available_bytes - device.baseline_bytes
        # The last stage takes all that is left; others leave at least one block for each stage behind.
        ends = range(start + 1, num_blocks - num_behind + 1) if num_behind else (num_blocks,)
        for end in ends:
            cost = self._cost(suffix[0], suffix[1] if num_behind else None, start, end)
            is_too_slow = self._shape.num_micro_batches * cost.compute_s >= self._limit_s
            # Both only grow with the number of blocks.
            if is_too_slow or self._stage_bytes(num_stages, num_stages - len(suffix), start, end) > room_bytes:
                return
            yield end, cost

    def _cost(self, device_index: int, next_index: int | None, start: int, end: int) -> StageCost:
        key = (device_index, next_index, start, end)
        if key not in self._costs:
            device = self._devices[device_index]
            self._costs[key] = stage_cost(
                self._table,
                self._shape,
                device,
                start_block=start,
                end_block=end,
                checkpointing=self._checkpointing,
                link=None if next_index is None else self._links.between(device, self._devices[next_index]),
            )
        return self._costs[key]

    def _stage_bytes(self, num_stages: int, stage_index: int, start: int, end: int) -> int:
        key = (num_stages, stage_index, start, end)
        if key not in self._job_bytes:
            self._job_bytes[key] = self._memory.job_bytes(
                start, end, num_stages=num_stages, stage_index=stage_index, checkpointing=self._checkpointing
            )
        return self._job_bytes[key]

    def _open(self, num_stages: int, order: Order, allowance: int) -> tuple[Candidate | None, int, bool]:
        """Branch and bound over the cuts of one order: best found, actions replayed, whether all was settled."""
        actions_per_replay = 2 * num_stages * self._shape.num_micro_batches
        best: Candidate | None = None
        limit_s = self._limit_s
        used = 0
        # Depth first, the most promising branch on top: the first leaf is already near the best.
        branches: list[tuple[float, tuple[int, ...], tuple[StageCost, ...]]] = [(0.0, (0,), ())]
        while branches:
            bound_s, cuts, costs = branches.pop()
            if bound_s >= limit_s * (1 - _TOLERANCE):
                continue
            if len(costs) == num_stages:
                if best is not None and used >= allowance:
                    return best, used, False
                used += actions_per_replay
                time = pipeline_step_time(costs, self._shape.num_micro_batches)
                if time.step_s < limit_s * (1 - _TOLERANCE):
                    best = Candidate(order, cuts, self._checkpointing, costs, time)
                    limit_s = time.step_s
                elif used >= allowance:
                    return best, used, False
                continue
            children = []
            for end, cost in self._stages(num_stages, order[len(costs) :], cuts[-1]):
                child_bound_s = self._completed_bound_s(num_stages, order, (*costs, cost), end)
                if child_bound_s < limit_s * (1 - _TOLERANCE):
                    children.append((child_bound_s, (*cuts, end), (*costs, cost)))
            branches += sorted(children, key=lambda child: child[0], reverse=True)
        return best, used, True

    def _completed_bound_s(self, num_stages: int, order: Order, costs: Sequence[StageCost], end: int) -> float:
        """Bound of the step when the first stages are settled and the others are at their best."""
        num_behind = num_stages - len(costs)
        bounds_s, round_trips_s = self._suffix_bounds(num_stages, order[len(costs) :])
        bound_s, round_trip_s = bounds_s[end], round_trips_s[end]
        for cost in reversed(costs):
            bound_s, round_trip_s = extend_lower_bound(
                cost,
                bound_s,
                round_trip_s,
                num_micro_batches=self._shape.num_micro_batches,
                num_behind=num_behind,
            )
            num_behind += 1
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
