"""Drives one job from its stored record to its end.

The record says where the job is; :func:`coordinator.jobs.commands.standing_commands` says what must be true there; the
driver makes it true, which ends in the event that moves the record on. What disturbs it (a lost worker, a person's
wish) interrupts the attempt, changes the record, and the driver looks again. Because the commands follow from the
record alone, a restarted coordinator drives on from wherever the last one died.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path

from coordinator.crash_points import crash_point
from coordinator.fleet.link_map import LinkMap
from coordinator.fleet.registry import WorkerExit
from coordinator.jobs import commands, events
from coordinator.jobs.commands import standing_commands
from coordinator.jobs.context import JobContext
from coordinator.jobs.exporting import export
from coordinator.jobs.interrupts import CancelWish, Interrupt, Interrupts, Loss, PauseWish, ResumeWish
from coordinator.jobs.job_scheduling import Scheduling
from coordinator.jobs.lineage import judge_evaluations
from coordinator.jobs.move_times import PLAN, STOP
from coordinator.jobs.moving import Replanner
from coordinator.jobs.phases import Phases
from coordinator.jobs.placing import ensure_workers, present_workers, stop_workers
from coordinator.jobs.prepared import PreparedData
from coordinator.jobs.profiler import Profiler
from coordinator.jobs.record import JobState
from coordinator.jobs.recovery import (
    Decision,
    Incident,
    Park,
    decide_recovery,
    outcome_of,
    recovery_event,
)
from coordinator.jobs.rolling_out import delete_rollouts
from coordinator.jobs.stepping import Stepper, repeat_last_decision
from coordinator.scheduling.queue import PlanningQueue
from plutino.errors import (
    AgentLostError,
    ConfigError,
    ExportError,
    InfeasiblePlanError,
    InvalidTransitionError,
    ModelError,
    NumericsError,
    PlutinoError,
)
from plutino.events import DataRead, Recovered, Recovering, WorkerLost
from plutino.types import AgentId, JobId, WorkerRef

logger = logging.getLogger(__name__)

_HOPELESS = (ConfigError, ModelError, ExportError, NumericsError, InfeasiblePlanError)
"""Errors that the same attempt would meet again."""


class JobDriver:
    """One live job."""

    def __init__(
        self,
        context: JobContext,
        *,
        queue: PlanningQueue,
        profiler: Profiler,
        link_map: LinkMap,
        default_dir: Path,
        stop_runner: Callable[[JobId], None],
    ) -> None:
        self.context = context
        self._queue = queue
        self._default_dir = default_dir
        self._stop_runner = stop_runner
        self._interrupts = Interrupts()
        self._replanner = Replanner(context, profiler)
        self._phases = Phases(context.spec)
        self._scheduling = Scheduling(
            context,
            queue=queue,
            profiler=profiler,
            link_map=link_map,
            replanner=self._replanner,
            phases=self._phases,
        )
        self._lost_at_s: float | None = None

    def interrupt(self, interrupt: Interrupt) -> None:
        """Tell the driver of something it did not wait for."""
        self._interrupts.put(interrupt)

    def worker_exited(self, exit_: WorkerExit) -> None:
        """A device says that a worker has ended."""
        record = self.context.record
        if record.is_terminal or record.plan_json is None or exit_.ref.plan_epoch != record.plan_epoch:
            return
        reason = f"{_label(exit_.ref)} on {self.context.fleet.name_of(exit_.agent_id)}: {exit_.reason}"
        if exit_.is_out_of_memory:
            self.context.excluded_devices[exit_.agent_id] = f"its worker ran out of memory ({exit_.reason})"
        self.interrupt(Loss((exit_.ref,), reason, is_out_of_memory=exit_.is_out_of_memory))

    def worker_in_trouble(self, ref: WorkerRef, error: str, reason: str) -> None:
        """A worker says that it cannot go on."""
        self.interrupt(Loss((ref,), f"{_label(ref)}: {reason}", error=error))

    def device_gone(self, agent_id: AgentId, reason: str) -> None:
        """A device's lease has run out, or it said goodbye."""
        if self.context.record.plan_json is None or self.context.record.is_terminal:
            return
        refs = tuple(ref for ref, owner in self.context.refs().items() if owner == agent_id)
        if refs:
            self.interrupt(Loss(refs, reason))

    async def run(self) -> None:
        """Drive until the job has ended."""
        try:
            await self._run()
        finally:
            self._replanner.stop()

    async def _run(self) -> None:
        context = self.context
        if context.record.plan_json is not None and not context.record.is_terminal:
            context.workers.expect(context.refs())
        while not context.record.is_terminal:
            try:
                await self._advance_or_interrupt()
            except AgentLostError as error:
                await self._on_loss(Loss(self._missing(), str(error)))
            except PlutinoError as error:
                await self._fail(str(error))
            except Exception as error:
                # A fault of ours must end the job with a reason, not leave it in a state that nobody drives.
                logger.exception("driving job %s failed", context.job_id)
                await self._fail(f"the coordinator failed ({type(error).__name__}: {error}); see its log")
        await self._end()

    # ---- one attempt ----

    async def _advance_or_interrupt(self) -> None:
        attempt = asyncio.create_task(self._advance())
        interrupted = asyncio.create_task(self._interrupts.wait())
        try:
            await asyncio.wait({attempt, interrupted}, return_when=asyncio.FIRST_COMPLETED)
            if self._interrupts.has_any:
                # What the attempt came to, if it ended in the same moment, is found again from the record.
                await _end_task(attempt)
                await self._on_interrupt(self._interrupts.take())
            elif (event := attempt.result()) is not None:
                await self.context.apply(event)
                crash_point_after(event)
        finally:
            attempt.cancel()
            interrupted.cancel()

    async def _advance(self) -> events.Event | None:
        """Make the record's standing commands true, in order; the last of them ends in an event."""
        prepared: PreparedData | None = None
        for command in standing_commands(self.context.record):
            match command:
                case commands.StartRunner():
                    prepared = await self.context.runner.prepare()
                    if self.context.record.state is JobState.SUBMITTED:
                        await self.context.tell(_data_read(prepared))
                        return events.DataPrepared(total_steps=prepared.total_steps)
                case commands.StopWorkers(before_epoch=epoch):
                    # A fresh process imports for 5 s and more; what an old one trained counts only under its hash.
                    goes_on = self.context.record.state is JobState.RECOVERING
                    reason = "its plan epoch is over"
                    await stop_workers(self.context, before_epoch=epoch, reason=reason, go_on=goes_on)
                    self.context.end_move_part(STOP)
                case commands.ReleaseReservation():
                    await asyncio.wrap_future(self.context.store.release(self.context.job_id))
                    self._queue.kick()
                case commands.Replan():
                    assert prepared is not None
                    await self._scheduling.place(prepared)
                    self.context.end_move_part(PLAN)
                    return None
                case commands.StartWorkers(restore_step=restore_step):
                    if (event := await self._start_workers(restore_step)) is not None:
                        return event
                case commands.HoldSteps():
                    logger.info("job %s holds before step %d", self.context.job_id, self.context.record.next_step)
                case commands.BeginSteps():
                    assert prepared is not None
                    repeat_last_decision(self.context)
                    return await Stepper(self.context, prepared, self._replanner, self._phases).run()
                case commands.BeginExport():
                    assert prepared is not None
                    repeat_last_decision(self.context)
                    return await export(self.context, prepared, default_dir=self._default_dir)
                case other:
                    raise AssertionError(f"no way to make {other} true")
        if self.context.record.state is JobState.PAUSED:
            await asyncio.Event().wait()  # only an interrupt ends this
        return None

    async def _start_workers(self, restore_step: int) -> events.AllLoaded | None:
        is_loading = self.context.record.state in (JobState.LOADING, JobState.RECOVERING)
        if not is_loading and (missing := self._missing()):
            raise AgentLostError(f"{len(missing)} of the job's workers are gone")
        names, loading = await ensure_workers(self.context, restore_step=restore_step)
        crash_point("workers_linked")
        if is_loading:
            self._replanner.loading = loading
        if not is_loading:
            return None
        await self.context.end_move()
        if self._lost_at_s is not None:
            record = self.context.record
            seconds = time.monotonic() - self._lost_at_s
            await self.context.tell(Recovered(step=record.next_step, plan_epoch=record.plan_epoch, seconds=seconds))
            self._lost_at_s = None
        return events.AllLoaded(parameter_names=names)

    def _missing(self) -> tuple[WorkerRef, ...]:
        refs = self.context.refs()
        return tuple(sorted(set(refs) - present_workers(self.context, refs)))

    # ---- disturbances ----

    async def _on_interrupt(self, interrupt: Interrupt) -> None:
        match interrupt:
            case CancelWish():
                await self.context.apply(events.CancelRequested())
            case PauseWish():
                await self._wish(events.PauseRequested())
            case ResumeWish():
                await self._wish(events.ResumeRequested())
            case Loss():
                await self._on_loss(interrupt)

    async def _wish(self, event: events.Event) -> None:
        try:
            await self.context.apply(event)
        except InvalidTransitionError as error:
            # The job's state changed between the wish and now; whoever wished sees the state in the answer.
            logger.info("%s", error)

    async def _on_loss(self, loss: Loss) -> None:
        context = self.context
        record = context.record
        if record.plan_json is None or any(ref.plan_epoch != record.plan_epoch for ref in loss.refs):
            return  # it belongs to a plan that is over
        if loss.error in {cls.__name__ for cls in _HOPELESS}:
            await self._fail(loss.reason)
            return
        self._lost_at_s = self._lost_at_s or time.monotonic()
        context.move_times = None
        self._scheduling.last_loss = loss.reason
        self._replanner.stop()
        self._phases.forget()
        may_carry = {*(device.agent_id for device in context.fleet.devices), *context.fleet.returning}
        num_left = len(may_carry - context.excluded_devices.keys())
        decision = decide_recovery(
            Incident(
                reason=loss.reason,
                lost=loss.refs,
                next_step=record.next_step,
                parameter_names=frozenset(record.parameter_names),
                shadows=context.store.shadows(context.job_id),
                recoveries=record.recoveries,
                max_recoveries=context.spec.placement.max_recoveries,
                num_devices_left=num_left,
            )
        )
        if isinstance(decision, Park):
            await self._fail(decision.reason)
            return
        await self._recover(loss, decision)

    async def _recover(self, loss: Loss, decision: Decision) -> None:
        context = self.context
        record = context.record
        names = [context.worker_name(ref) for ref in loss.refs]
        step, kind = outcome_of(decision, record.next_step)
        stopping = context.spec.training.early_stopping
        best = judge_evaluations(
            [row for row in context.store.evaluations(context.job_id) if row.step <= step],
            min_delta=0.0 if stopping is None else stopping.min_delta,
        )
        seen = [
            WorkerLost(
                worker=name, plan_epoch=record.plan_epoch, reason=loss.reason, out_of_memory=loss.is_out_of_memory
            )
            for name in names
        ]
        what = Recovering(
            decision=kind,
            step=step,
            plan_epoch=record.plan_epoch + 1,
            undone_steps=record.next_step - step,
            reason=decision.reason,
        )
        await context.apply(recovery_event(decision, best), events=[*seen, what])
        crash_point("recovery_stored")

    async def _fail(self, reason: str) -> None:
        if not self.context.record.is_terminal:
            await self.context.apply(events.Failed(reason=reason))

    async def _end(self) -> None:
        context = self.context
        await stop_workers(
            context,
            before_epoch=context.record.plan_epoch + 1,
            reason=f"job {context.record.state.value}",
            keep_stages=bool(context.keeps_stage_s) and context.record.state is JobState.SUCCEEDED,
        )
        await asyncio.wrap_future(context.store.release(context.job_id))
        context.runner.finish()
        self._stop_runner(context.job_id)
        shadow_ids = [shadow.shadow_id for shadow in context.store.shadows(context.job_id)]
        if shadow_ids:
            await asyncio.wrap_future(context.store.remove_shadows(context.job_id, shadow_ids))
        await asyncio.to_thread(context.shadow_files.delete_job, context.job_id)
        await asyncio.to_thread(delete_rollouts, context.job_dir)
        self._queue.kick()


def _label(ref: WorkerRef) -> str:
    return f"stage {ref.stage_index}" + (f".{ref.replica_index}" if ref.replica_index else "")


async def _end_task(task: asyncio.Task[events.Event | None]) -> None:
    """Cancel a task and wait until it has ended.

    Once is not enough: before Python 3.12, asyncio.wait_for swallows a cancellation that meets its result.
    """
    while not task.done():
        task.cancel()
        await asyncio.wait({task}, timeout=0.2)
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.info("interrupted while failing: %s", error)


def crash_point_after(event: events.Event) -> None:
    """Tests kill the coordinator after some events are stored."""
    if isinstance(event, events.TrainingDone):
        crash_point("training_done_stored")


def _data_read(prepared: PreparedData) -> DataRead:
    return DataRead(
        num_train_rows=prepared.num_train,
        num_eval_rows=prepared.num_eval,
        num_cut_rows=prepared.num_truncated,
        total_steps=prepared.total_steps,
    )
