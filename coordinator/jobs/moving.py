"""Keeps an eye on a running job's pace and its devices, and has a better plan ready when one is worth moving to.

The decisions are :mod:`coordinator.jobs.replanning`'s. What is known lives in this process alone: a restarted
coordinator does not move a job before it was planned anew.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from coordinator.jobs.cached_moves import cached_choice
from coordinator.jobs.context import JobContext
from coordinator.jobs.eligibility import eligible
from coordinator.jobs.move_cost import LoadingTimes, move_cost_s
from coordinator.jobs.planning import profiles_of
from coordinator.jobs.profiler import Profiler
from coordinator.jobs.replanning import (
    WINDOW_STEPS,
    Choice,
    Move,
    Pace,
    as_running,
    corrected,
    decide_move,
    have_changed,
    may_move,
    moves_in_words,
    planned_compute_s,
    step_s_of,
    why_in_words,
)
from coordinator.scheduling.problem import PlanningProblem
from partitioner.device import DeviceProfile
from partitioner.plan import Plan
from plutino.errors import InfeasiblePlanError
from plutino.events import WorkerStepTimes
from plutino.types import AgentId

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ReadyMove:
    """A plan to move to, and why."""

    problem: PlanningProblem
    """With the plan as its known one."""
    reason: str


class Replanner:
    """Watches one job.

    Args:
        context: the job.
        profiler: measures devices that have joined.
        clock: seconds that never go back.
    """

    def __init__(self, context: JobContext, profiler: Profiler, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._context = context
        self._profiler = profiler
        self._clock = clock
        self._pace = Pace()
        self._problem: PlanningProblem | None = None
        self._planned_s: dict[tuple[int, int], float] = {}
        self._seen_factors: dict[str, float] = {}
        self._seen_devices: frozenset[AgentId] = frozenset()
        self._second_look_in: int | None = None
        """Steps until the window has none from before the change that was looked at."""
        self._last_move_s: float | None = None
        self._considering: asyncio.Task[None] | None = None
        self.loading = LoadingTimes(total_s=0.0)
        """Of the plan's workers."""
        self.move: ReadyMove | None = None
        """Set once a move is worth it."""

    def begin_plan(self, problem: PlanningProblem, plan: Plan) -> None:
        """A plan was made; from now on its workers are watched."""
        self.stop()
        self._problem = as_running(problem, plan)
        self._planned_s = planned_compute_s(plan)
        self._pace.begin_plan()
        self._seen_factors = {}
        self._second_look_in = None
        self._seen_devices = frozenset(device.agent_id for device in self._context.fleet.devices)

    def stop(self) -> None:
        """Forget what is being considered: the plan that it was about is over."""
        if self._considering is not None:
            self._considering.cancel()
            self._considering = None
        self.move = None

    @property
    def _is_watched(self) -> bool:
        # Trials share their stages with other jobs.
        return self._context.spec.placement.replan == "auto" and self._context.trial is None

    @property
    def _has_cache(self) -> bool:
        return self._context.spec.training.activation_cache != "off"

    def take_problem(self) -> PlanningProblem | None:
        """What a job that moves is planned from; None if it does not move."""
        if self.move is None:
            return None
        self._last_move_s = self._clock()
        return self.move.problem

    def known_devices(self) -> tuple[DeviceProfile, ...]:
        """Devices at the plan's micro-batch, with the seconds that its workers took lately; none before a plan."""
        return () if self._problem is None else corrected(self._problem, self._pace.factors()).devices

    def note(self, workers: Sequence[WorkerStepTimes]) -> None:
        """Take in a committed step's times, and begin to look for another plan where something has changed."""
        context = self._context
        if self._problem is None or not self._is_watched:
            return
        agents = {(ref.stage_index, ref.replica_index): agent for ref, agent in context.refs().items()}
        ratios: dict[str, float] = {}
        for times in workers:
            place = (times.worker.stage_index, times.worker.replica_index)
            if self._planned_s.get(place):
                ratios[agents[place]] = times.compute_s / self._planned_s[place]
        if not self._has_cache:
            # From the cache steps are faster without a device's doing: there only joining counts.
            self._pace.note(ratios)
        if self._second_look_in:
            self._second_look_in -= 1
        if self._considering is not None or not may_move(self._clock(), self._last_move_s):
            return
        factors = self._pace.factors()
        present = frozenset(device.agent_id for device in context.fleet.devices)
        joined = present - self._seen_devices
        if have_changed(factors, self._seen_factors):
            # Half of the window is older than the change: what is seen now is the least of it.
            self._second_look_in = WINDOW_STEPS // 2 + 1
        elif self._second_look_in == 0 and factors:
            self._second_look_in = None
        elif not joined:
            return
        self._seen_factors, self._seen_devices = factors, present
        for agent_id in factors:
            self._profiler.doubt(AgentId(agent_id))
        self._considering = asyncio.create_task(self._consider(self._problem, factors, joined))
        self._considering.add_done_callback(self._on_considered)

    def _on_considered(self, task: asyncio.Task[None]) -> None:
        if self._considering is task:
            self._considering = None
        if not task.cancelled() and (error := task.exception()) is not None:
            # The job runs on with the plan that it has.
            logger.error("no other plan of %s could be looked for", self._context.job_id, exc_info=error)

    async def _consider(self, problem: PlanningProblem, factors: dict[str, float], joined: frozenset[AgentId]) -> None:
        context = self._context
        present = context.plan
        plan_epoch = context.record.plan_epoch
        problem = corrected(await self._with_present_devices(problem), factors)
        if not set(present.agent_ids) <= {device.agent_id for device in problem.devices}:
            return  # a device of the plan is away: that is for the recovery
        try:
            free = problem.model_copy(update={"devices": self._not_taken(problem.devices)})
            new = await asyncio.to_thread(free.plan)
        except InfeasiblePlanError as error:
            logger.info("job %s stays: %s", context.job_id, error)
            return
        move_s = move_cost_s(
            present,
            new,
            problem,
            loading=self.loading,
            upload_s=context.slowest_upload_s or 0.0,
            factors=factors,
        )
        price = self._choice_from_cache if self._has_cache else self._choice
        choice = await asyncio.to_thread(price, present, new, problem, move_s)
        if context.record.plan_epoch != plan_epoch:
            return
        decision = decide_move(choice)
        names = {device.agent_id: device.name for device in problem.devices}
        # Of those that joined only the ones that the new plan uses are a reason.
        used = sorted(names[agent_id] for agent_id in joined if agent_id in new.agent_ids)
        why = why_in_words(names, factors, used)
        if isinstance(decision, Move):
            what = "the blocks are loaded again for an epoch" if present.from_cache else moves_in_words(present, new)
            reason = f"{what}, because {why}: {decision.reason}"
            self.move = ReadyMove(problem.model_copy(update={"known_plan": new}), reason)
        else:
            logger.info("job %s keeps its plan although %s: %s", context.job_id, why, decision.reason)

    def _choice(self, present: Plan, new: Plan, problem: PlanningProblem, move_s: float) -> Choice:
        record = self._context.record
        return Choice(
            now_s=self._clock(),
            last_move_s=self._last_move_s,
            steps_left=record.end_step - record.next_step,
            step_s=step_s_of(problem, present),
            new_step_s=new.step_s,
            move_s=move_s,
        )

    def _choice_from_cache(self, present: Plan, new: Plan, problem: PlanningProblem, move_s: float) -> Choice:
        record = self._context.record
        return cached_choice(
            present,
            new,
            problem,
            self._context.spec,
            next_step=record.next_step,
            start_step=record.start_step,
            end_step=record.end_step,
            total_steps=record.total_steps,
            move_s=move_s,
            now_s=self._clock(),
            last_move_s=self._last_move_s,
        )

    def _not_taken(self, devices: Sequence[DeviceProfile]) -> tuple[DeviceProfile, ...]:
        """The devices with the memory that other jobs leave."""
        taken: Counter[str] = Counter()
        for row in self._context.store.reservations():
            if row.job_id != self._context.job_id:
                taken[row.agent_id] += row.bytes
        return tuple(
            device.model_copy(update={"available_bytes": free})
            for device in devices
            if (free := device.available_bytes - taken[device.agent_id]) > 0
        )

    async def _with_present_devices(self, problem: PlanningProblem) -> PlanningProblem:
        """The problem over the devices that are there now."""
        context = self._context
        found = eligible(
            context.fleet.devices,
            wanted_names=context.spec.placement.devices,
            numerics=context.numerics,
            excluded=context.excluded_devices,
        )
        known = {device.agent_id for device in problem.devices}
        new = [device for device in found.devices if device.agent_id not in known]
        there = {str(device.agent_id) for device in context.fleet.devices}
        held = [device for device in problem.devices if device.agent_id in there]
        profiles = await profiles_of(new, context.spec, problem.shape, self._profiler, context.numerics)
        return problem.model_copy(update={"devices": (*held, *profiles)})
