"""Whether a running job should move to another plan: pure.

Live seconds of the workers are compared with those that the plan was made from (:class:`Pace`). Where a device has
become slower or faster, or others have joined, the present plan and the best one are priced with the same corrected
numbers, and :func:`decide_move` weighs what the rest of the job would gain against what moving costs
(:mod:`coordinator.jobs.move_cost`).
"""

from __future__ import annotations

import statistics
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from coordinator.jobs.kept_numerics import with_micro_batch
from coordinator.scheduling.problem import PlanningProblem
from partitioner.plan import Plan
from partitioner.pricing import Pricer
from partitioner.replay import replay
from partitioner.shape import JobShape

MIN_INTERVAL_S = 300.0
"""A job moves at most once in so long."""
NOISE_FACTOR = 1.5
"""A device this much slower or faster than planned has changed; less is noise. Speeds that swing by 30 % stay below."""
GAIN_SHARE = 0.10
"""A new plan must shorten the step by this share."""
GAIN_FACTOR = 1.5
"""What is gained must exceed the cost of moving by this factor, because both are estimates."""
WINDOW_STEPS = 7
"""The median of so many steps is a worker's pace."""
WARM_UP_STEPS = 2
"""The first steps of a plan also fill caches and the allocator."""


class Pace:
    """How fast the workers of a job really compute, as multiples of what their plan says.

    That all of them take the same multiple is the profile's error and no reason to move anything: it is learnt from the
    job's first steps.
    """

    def __init__(self) -> None:
        self._common: float | None = None
        self._ratios: dict[str, deque[float]] = {}
        self._num_skipped = 0

    def begin_plan(self) -> None:
        """The ratios from now on are those of another plan."""
        self._ratios = defaultdict(lambda: deque(maxlen=WINDOW_STEPS))
        self._num_skipped = 0

    def note(self, ratios: Mapping[str, float]) -> None:
        """Add a step: measured over planned seconds of computing, by agent."""
        if self._num_skipped < WARM_UP_STEPS:
            self._num_skipped += 1
            return
        for agent_id, ratio in ratios.items():
            self._ratios[agent_id].append(ratio)
        if self._common is None and self._is_known:
            self._common = statistics.median_low(statistics.median(held) for held in self._ratios.values())

    @property
    def _is_known(self) -> bool:
        return bool(self._ratios) and all(len(held) == WINDOW_STEPS for held in self._ratios.values())

    def factors(self) -> dict[str, float]:
        """Agents whose seconds have changed, and by which factor; empty while too few steps were seen."""
        if self._common is None or not self._is_known:
            return {}
        found = {agent: statistics.median(held) / self._common for agent, held in self._ratios.items()}
        return {agent: factor for agent, factor in found.items() if not 1 / NOISE_FACTOR < factor < NOISE_FACTOR}


def have_changed(now: Mapping[str, float], before: Mapping[str, float]) -> bool:
    """Whether some device's factor is another one than when it was last looked at, by more than noise."""
    for agent_id in now.keys() | before.keys():
        change = now.get(agent_id, 1.0) / before.get(agent_id, 1.0)
        if not 1 / NOISE_FACTOR < change < NOISE_FACTOR:
            return True
    return False


def planned_compute_s(plan: Plan) -> dict[tuple[int, int], float]:
    """Seconds that every worker computes in a step, by stage and replica."""
    return {
        (stage.stage_index, index): (owners.count(index) if owners else plan.num_micro_batches)
        * (replica.forward_s + replica.backward_s)
        for stage, owners in zip(plan.stages, plan.micro_batch_owners, strict=True)
        for index, replica in enumerate(stage.replicas)
    }


def as_running(problem: PlanningProblem, plan: Plan) -> PlanningProblem:
    """The problem as it stands once a plan runs: micro-batch and codec are what they are."""
    at_rows = with_micro_batch(problem, plan.micro_batch_rows)
    shape = at_rows.shape.model_copy(update=codecs_of(plan, at_rows.shape))
    return at_rows.model_copy(update={"shape": shape, "codecs": (), "is_started": True, "known_plan": None})


def codecs_of(plan: Plan, shape: JobShape) -> dict[str, object]:
    """Fields of a shape: borders that carry bf16 do so in every later plan, all others never.

    A side network's state is no part of what is rounded in place: there the codec is that of every boundary.
    """
    if shape.side_reduction:
        return {"codec": plan.codec}
    # A plan has no boundary at some of the borders that an earlier one rounded at: they are rounded in place there.
    return {"codec": "raw", "bf16_borders": tuple(sorted({*shape.bf16_borders, *plan.bf16_borders}))}


def corrected(problem: PlanningProblem, factors: Mapping[str, float]) -> PlanningProblem:
    """The problem with the seconds of some devices multiplied."""
    devices = tuple(
        device.model_copy(update={"timings": device.timings.times(factors.get(device.agent_id, 1.0))})
        for device in problem.devices
    )
    return problem.model_copy(update={"devices": devices})


def step_s_of(problem: PlanningProblem, plan: Plan) -> float:
    """Seconds of a step of a plan as it is, shares included, with the problem's numbers.

    Raises:
        KeyError: the problem lacks one of the plan's devices.
    """
    position = {device.agent_id: i for i, device in enumerate(problem.devices)}
    shape = problem.shape.model_copy(update={"runs_ahead": plan.runs_ahead})
    pricer = Pricer(problem.table, shape, problem.devices, problem.links)
    layout = tuple(tuple(position[agent_id] for agent_id in stage.agent_ids) for stage in plan.stages)
    groups = [
        replace(
            pricer.group(layout, k, stage.start_block, stage.end_block, checkpointing=stage.checkpointing),
            owners=plan.micro_batch_owners[k],
        )
        for k, stage in enumerate(plan.stages)
    ]
    return replay(groups, plan.num_micro_batches).step_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What is known when a job could move."""

    now_s: float
    last_move_s: float | None
    """None if it never moved."""
    steps_left: int
    step_s: float
    """Of the present plan, with the corrected numbers."""
    new_step_s: float
    move_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Stay:
    """The present plan goes on."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """The job moves to the new plan at a commit."""

    reason: str


def may_move(now_s: float, last_move_s: float | None) -> bool:
    """Whether the last move is long enough ago."""
    return last_move_s is None or now_s - last_move_s >= MIN_INTERVAL_S


def decide_move(choice: Choice) -> Move | Stay:
    """Weigh the gain over the rest of the job against the cost of moving."""
    if not may_move(choice.now_s, choice.last_move_s):
        return Stay(reason=f"it moved less than {MIN_INTERVAL_S:.0f} s ago")
    saved_s = choice.step_s - choice.new_step_s
    gain_s = saved_s * choice.steps_left
    seconds = f"a step would take {choice.new_step_s:.3g} s instead of {choice.step_s:.3g} s"
    if saved_s < GAIN_SHARE * choice.step_s:
        return Stay(reason=f"{seconds}, which is not {GAIN_SHARE:.0%} less")
    weighed = f"{seconds}; the {choice.steps_left} steps left gain {gain_s:.3g} s, moving costs {choice.move_s:.3g} s"
    if gain_s < GAIN_FACTOR * choice.move_s:
        return Stay(reason=f"{weighed}, and it must gain {GAIN_FACTOR:g} times that")
    return Move(reason=weighed)


def moves_in_words(present: Plan, new: Plan) -> str:
    """Which blocks go from whom to whom: ``blocks 5-7 from slow to fast``."""
    changes = [
        (block, before, after)
        for (block, before), (_, after) in zip(_holders(present), _holders(new), strict=True)
        if before != after
    ]
    if not changes:
        return "the same blocks with other shares of the micro-batches"
    parts = []
    # Neighbouring blocks with the same way: their number less their place in the list is the same.
    for (_, before, after), run in groupby(enumerate(changes), key=lambda item: (item[1][0] - item[0], *item[1][1:])):
        blocks = [block for _, (block, _, _) in run]
        name = f"block {blocks[0]}" if len(blocks) == 1 else f"blocks {blocks[0]}-{blocks[-1]}"
        parts.append(f"{name} from {before} to {after}")
    return ", ".join(parts)


def _holders(plan: Plan) -> list[tuple[int, str]]:
    return [
        (block, " and ".join(stage.device_names))
        for stage in plan.stages
        for block in range(stage.start_block, stage.end_block)
    ]


def why_in_words(names: Mapping[str, str], factors: Mapping[str, float], joined: Sequence[str]) -> str:
    """What has changed: ``slow computes 9.8 times as long as planned``."""
    parts = [
        f"{names.get(agent, agent)} takes {factor:.2g} times as long as planned" for agent, factor in factors.items()
    ]
    if joined:
        parts.append(f"{', '.join(joined)} joined")
    return " and ".join(parts) or "devices changed"
