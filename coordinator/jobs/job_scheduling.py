"""A job's way to its plan: wait for devices, measure, queue, reserve, store."""

from __future__ import annotations

import asyncio
import time

from coordinator.artifacts.traces import PlannedEpoch
from coordinator.crash_points import crash_point
from coordinator.fleet.link_map import LinkMap
from coordinator.jobs import events
from coordinator.jobs.context import JobContext
from coordinator.jobs.kept_numerics import broken_by, in_words, kept_problem
from coordinator.jobs.moving import Replanner
from coordinator.jobs.phases import Phases, with_cached_step
from coordinator.jobs.planning import make_numerics, make_problem, micro_batch_cut_of, read_model
from coordinator.jobs.prepared import PreparedData
from coordinator.jobs.profiler import Profiler
from coordinator.jobs.record import JobState
from coordinator.jobs.replanning import as_running
from coordinator.scheduling.problem import PlanningProblem
from coordinator.scheduling.queue import PlanningQueue
from coordinator.scheduling.round import Verdict
from coordinator.scheduling.scheduler import Reservation
from partitioner.device import DeviceProfile
from plutino.errors import AgentLostError, InfeasiblePlanError, JobError, UnmeasuredError
from plutino.events import PlanMade
from plutino.families import family_of
from plutino.job.numerics import NumericsRecord
from plutino.types import AgentId, JobId

_LOOK_AGAIN_S = 0.5
"""How often a job that waits for devices, or for the memory that others hold, looks for them."""


class Scheduling:
    """Plans one live job, as often as it needs a plan.

    Args:
        context: the job.
        queue: all jobs that wait for devices.
        profiler: measures devices.
        link_map: the ways between devices.
        replanner: watches the job once it runs; it may have a plan to move to.
        phases: knows whether the job should run from its activation cache.
    """

    def __init__(
        self,
        context: JobContext,
        *,
        queue: PlanningQueue,
        profiler: Profiler,
        link_map: LinkMap,
        replanner: Replanner,
        phases: Phases,
    ) -> None:
        self._context = context
        self._queue = queue
        self._profiler = profiler
        self._link_map = link_map
        self._replanner = replanner
        self._phases = phases
        self.last_loss: str | None = None
        """What was lost before the plan that is to be made; None before any loss."""

    async def place(self, prepared: PreparedData) -> None:
        """Make a plan and hold its devices' memory, waiting until the queue gives them; the record has it then.

        Args:
            prepared: the job's rows.

        Raises:
            InfeasiblePlanError: the job fits no devices that are in, or those that wait.
        """
        context = self._context
        if not context.fleet.devices and context.record.state is JobState.PLANNING:
            reason = "no device has joined; make a token for each: plutino token create"
            await context.apply(events.Queued(reason=reason))
        if context.record.state is JobState.PLANNING:
            await context.fleet.settled()
            await self._wait_for_stages()
        else:
            await self._settled_after_loss()
        while True:
            held = self._held_by_others()
            try:
                return await self._place_on_measured(prepared)
            except InfeasiblePlanError as error:
                if context.record.state is not JobState.PLANNING:
                    if await self._comes_back(error):
                        continue
                    raise
                if not held or not isinstance(error, UnmeasuredError):
                    raise
                holders = ", ".join(sorted({job_id for job_id, _ in held}))
                await context.apply(events.Queued(reason=f"waits until {holders} leaves room: {error}"))
            while self._held_by_others() == held:
                await asyncio.sleep(_LOOK_AGAIN_S)

    async def _comes_back(self, refusal: InfeasiblePlanError) -> bool:
        """Whether a device that said goodbye is in again in time, for a job that does not fit without it."""
        fleet = self._context.fleet
        away = fleet.returning
        if not away:
            return False
        names = ", ".join(fleet.name_of(agent_id) for agent_id in away)
        await self._context.apply(events.Queued(reason=f"waits for {names} to come back: {refusal}"))
        while fleet.returning:
            await asyncio.sleep(_LOOK_AGAIN_S)
            if not {device.agent_id for device in fleet.devices}.isdisjoint(away):
                return True
        return False

    async def _wait_for_stages(self) -> None:
        """A stage is a device's: with fewer devices than ``placement.stages`` others are on their way, or missing."""
        context, wanted = self._context, self._context.spec.placement.stages or 1
        if (num_devices := len(context.fleet.devices)) < wanted:
            _, table = await asyncio.to_thread(read_model, context.spec)
            if wanted > table.num_blocks:
                return  # which no device could change: the planner says so
            reason = (
                f"placement.stages asks for {wanted} devices, and {num_devices} attached; start others, or cancel "
                "the job and lower placement.stages"
            )
            await context.apply(events.Queued(reason=reason))
            while len(context.fleet.devices) < wanted:
                await asyncio.sleep(_LOOK_AGAIN_S)
            await context.fleet.settled()

    async def _place_on_measured(self, prepared: PreparedData) -> None:
        started_s = time.monotonic()
        try:
            problem = await self._problem(prepared)
        except InfeasiblePlanError as error:
            raise type(error)(self._after_loss(str(error))) from error

        async def carry_out(verdict: Verdict) -> bool:
            return await self._carry_out(verdict, problem, time.monotonic() - started_s)

        await self._queue.place(self._context.job_id, problem, carry_out)

    def _held_by_others(self) -> frozenset[tuple[str, str]]:
        """Which jobs hold memory on which devices, but for this one."""
        rows = self._context.store.reservations()
        return frozenset((row.job_id, row.agent_id) for row in rows if row.job_id != self._context.job_id)

    async def _settled_after_loss(self) -> None:
        try:
            await self._context.fleet.settled_soon()
        except AgentLostError as error:
            raise InfeasiblePlanError(
                self._after_loss(f"{error}; start the agents again and submit the job anew")
            ) from error

    def _after_loss(self, reason: str) -> str:
        """A refusal, with what was lost before it if anything was, and what a new plan may not change."""
        reason = reason if self.last_loss is None else f"{self.last_loss}; on what is left: {reason}"
        return reason if self._fixed_numerics is None else f"{reason}. {in_words(self._fixed_numerics)}"

    @property
    def _fixed_numerics(self) -> NumericsRecord | None:
        """What every plan must keep; None before the first, or where the job leaves its numerics free."""
        context = self._context
        is_fixed = context.record.numerics_json is not None and context.spec.placement.numerics == "fixed"
        return context.numerics if is_fixed else None

    async def _problem(self, prepared: PreparedData) -> PlanningProblem:
        problem = await self._posed_problem(prepared)
        return problem if self._fixed_numerics is None else kept_problem(problem, self._fixed_numerics)

    async def _posed_problem(self, prepared: PreparedData) -> PlanningProblem:
        context = self._context
        trial = context.trial if context.record.plan_epoch == 1 else None
        if trial is not None and trial.problem is not None:
            # The other trials' devices, seconds and plan: the queue looks whether they still fit.
            return trial.problem.model_copy(update={"job_id": context.job_id, "known_plan": trial.plan})
        if (moving := self._replanner.take_problem()) is not None:
            return moving
        if (changing := self._phases.take_problem()) is not None:
            return changing
        problem = await make_problem(
            context.job_id,
            context.spec,
            prepared,
            context.fleet,
            self._profiler,
            numerics=self._fixed_numerics,
            excluded=context.excluded_devices,
            is_started=context.record.plan_epoch > 1,
            links=self._link_map,
            together_with=() if trial is None else trial.specs,
            known=await self._known_devices(),
        )
        if trial is not None:
            trial.problem = problem
        return problem

    async def _known_devices(self) -> dict[AgentId, DeviceProfile]:
        """What the plan before knew of its devices, at the micro-batch that its successors keep.

        Measuring takes longer than everything else of a recovery, and needs memory beside the workers that run.
        """
        context = self._context
        if self._fixed_numerics is None:
            return {}
        devices = self._replanner.known_devices()
        if not devices:
            before = context.record.plan_epoch - 1
            planned = await asyncio.to_thread(context.traces.planned, context.job_id, before)
            devices = () if planned is None else as_running(planned.problem, planned.plan).devices
        return {AgentId(device.agent_id): device for device in devices}

    async def _carry_out(self, verdict: Verdict, problem: PlanningProblem, search_s: float) -> bool:
        context = self._context
        if verdict.kind == "wait":
            reason = f"queued: {verdict.reason}"
            if context.record.state is JobState.PLANNING and context.record.reason != reason:
                await context.apply(events.Queued(reason=verdict.reason))
            return False
        if verdict.kind in ("park", "refuse"):
            unmeasured = problem.num_unmeasured > 0
            raise (UnmeasuredError if unmeasured else InfeasiblePlanError)(self._after_loss(verdict.reason))
        assert verdict.plan is not None
        record = context.record
        if (fixed := self._fixed_numerics) is not None:
            if (broken := broken_by(verdict.plan, fixed)) is not None:
                raise JobError(
                    f"the new plan has {broken}, which the job's numerics record fixes; this is a fault of ours"
                )
            numerics_json = fixed.model_dump_json()
        else:
            earlier = None if record.numerics_json is None else context.numerics
            numerics = make_numerics(
                verdict.plan,
                family_of(problem.table.family),
                context.fleet.devices,
                is_beside=problem.shape.side_reduction > 0,
                replicas_fold=problem.shape.replicas_fold,
                sums=problem.shape.sums,
                micro_batch_cut=micro_batch_cut_of(verdict.plan, context.spec, earlier),
            )
            numerics_json = numerics.model_dump_json()
        plan = verdict.plan.model_copy(update={"cached": None})
        if context.trial is None:
            plan = with_cached_step(verdict.plan, problem, context.spec, total_steps=record.total_steps)
        plan_json = plan.model_dump_json()
        if context.trial is not None:
            context.trial.plan = verdict.plan
        await context.apply(
            events.Planned(plan_json=plan_json, numerics_json=numerics_json),
            reservations=[
                Reservation(job_id=JobId(h.job_id), agent_id=AgentId(h.agent_id), bytes=h.bytes) for h in verdict.held
            ],
            events=[PlanMade(plan_epoch=record.plan_epoch, plan_json=plan_json, search_s=search_s)],
        )
        crash_point("plan_reserved")
        planned = PlannedEpoch(plan=plan, problem=problem)
        await asyncio.to_thread(context.traces.put_plan, context.job_id, record.plan_epoch, planned)
        self._replanner.begin_plan(problem, plan)
        self._phases.begin_plan(problem, plan)
        return True
