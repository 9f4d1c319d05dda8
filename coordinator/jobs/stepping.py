"""Running a job's steps: feed, collect votes, decide, make the decision durable, tell the workers.

The order of everything at a step border is a function of the store's rows alone (score the base model, evaluate,
judge, train), so that a restarted coordinator goes on with exactly the unit the workers expect.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time

from coordinator.crash_points import crash_point
from coordinator.jobs import events as job_events
from coordinator.jobs.ability import measure_general, score_few_shot
from coordinator.jobs.barrier import Abort, AbortKind, Barrier, Commit, decide, open_barrier
from coordinator.jobs.context import JobContext
from coordinator.jobs.lineage import EvaluationRow, LedgerRow, LedgerStatus, judge_evaluations
from coordinator.jobs.move_times import STORE, MoveTimes
from coordinator.jobs.moving import Replanner
from coordinator.jobs.phases import Phases
from coordinator.jobs.prepared import PreparedData
from coordinator.jobs.rolling_out import StepRows
from coordinator.jobs.scoring_moments import score_once
from coordinator.jobs.shadow_policy import shadow_due, shadow_every
from coordinator.jobs.tracing import is_recorded
from coordinator.jobs.units import Batch, end_unit, evaluate, feed
from coordinator.jobs.votes import counts_of, times_of, vote_of
from plutino.errors import JobError, NumericsError
from plutino.events import (
    Evaluated,
    Notice,
    PlanChanges,
    StepCommitted,
    StepSkipped,
)
from plutino.job.training import learning_rate
from plutino.types import Unit, UnitKind
from protos import workers_pb2 as pb

logger = logging.getLogger(__name__)

_BATCHES_AHEAD = 4


class Stepper:
    """Runs the steps of one plan epoch, from the record's next step to the end of training."""

    def __init__(self, context: JobContext, prepared: PreparedData, replanner: Replanner, phases: Phases) -> None:
        self._context = context
        self._prepared = prepared
        self._replanner = replanner
        self._phases = phases
        self._rows = StepRows(context, prepared)
        self._batches: dict[int, asyncio.Task[Batch]] = {}
        self._fed: set[int] = set()
        self._step_s: float | None = None
        self._last_decision_s = time.monotonic()

    async def run(self) -> job_events.TrainingDone | job_events.MoveDecided:
        """Run until the last step is decided, early stopping says so, or another plan is worth moving to."""
        context = self._context
        try:
            while True:
                step = context.record.next_step
                if context.plan.from_cache and self._needs_backbone(step) and step not in self._fed:
                    return await self._leave(step, self._phases.return_to_pipeline())
                await self._border()
                if (reason := self._done_reason()) is not None:
                    return job_events.TrainingDone(reason=reason)
                if (change := self._leaves_pipeline(step)) is not None and step not in self._fed:
                    return await self._leave(step, change)
                if (move := self._replanner.move) is not None and step not in self._fed:
                    return await self._leave(step, move.reason)
                await self._rows.make(step)
                await self._feed(step)
                if self._may_feed_ahead(step + 1):
                    await self._feed(step + 1)
                await self._decide(step)
        finally:
            for task in self._batches.values():
                task.cancel()

    def _may_feed_ahead(self, step: int) -> bool:
        # A step that is fed is run: before a move there must be none.
        record = self._context.record
        is_moving = self._replanner.move is not None or self._phases.may_change_before(
            step, record.start_step, self._prepared.num_train
        )
        is_known = step < self._rows.last_known(step - 1, record.end_step)
        return is_known and not is_moving and not self._evaluation_due(step)

    def _needs_backbone(self, step: int) -> bool:
        """Whether something is due before a step, or after the last one, that runs through the blocks."""
        return self._done_reason() is not None or (self._evaluation_due(step) and not self._is_evaluated(step))

    def _leaves_pipeline(self, step: int) -> str | None:
        """Why the job should train without its backbone from this step on; None: it stays as it is."""
        context, record = self._context, self._context.record
        if context.plan.from_cache:
            return None
        left_out = (s.vote.times.left_out_rows for s in context.workers.statuses if s.vote is not None)
        self._phases.note(step, record.start_step, self._prepared.num_train, left_out)
        every = context.spec.training.eval_every if context.spec.data.has_eval else None
        until = record.end_step if every is None else min(record.end_step, (step // every + 1) * every)
        return self._phases.leave_pipeline(until - step, move_s=self._replanner.loading.total_s)

    async def _leave(self, steps_done: int, reason: str) -> job_events.MoveDecided:
        """The state must be durable before the workers that hold it end."""
        context = self._context
        times = MoveTimes(steps_done)
        if steps_done not in context.durable():
            await self._store_shadow_now(steps_done)
        times.end(STORE)
        context.move_times = times
        await context.tell(PlanChanges(step=steps_done, plan_epoch=context.record.plan_epoch + 1, reason=reason))
        return job_events.MoveDecided(reason=reason)

    # ---- borders between steps ----

    async def _border(self) -> None:
        """What is due after ``next_step`` steps and before the next one."""
        context = self._context
        steps_done = context.record.next_step
        spec = context.spec
        if steps_done == 0 and spec.scoring is not None and spec.scoring.before:
            await score_once(context, self._prepared, "before")
        if steps_done == 0:
            await measure_general(context, self._prepared, "general_before")
            await score_few_shot(context, self._prepared)
        if self._evaluation_due(steps_done) and not self._is_evaluated(steps_done):
            await self._evaluate(steps_done)
            self._last_decision_s = time.monotonic()

    def _evaluation_due(self, steps_done: int) -> bool:
        training = self._context.spec.training
        if not self._context.spec.data.has_eval or steps_done == 0:
            return False
        is_end = steps_done >= self._context.record.total_steps
        return is_end or (training.eval_every is not None and steps_done % training.eval_every == 0)

    def _is_evaluated(self, steps_done: int) -> bool:
        return any(row.step == steps_done for row in self._context.store.evaluations(self._context.job_id))

    async def _evaluate(self, steps_done: int) -> None:
        context = self._context
        started_s = time.monotonic()
        measured = await evaluate(context, num_rows=self._prepared.num_eval)
        if not math.isfinite(measured.loss_sum):
            raise NumericsError(
                f"the evaluation loss after {steps_done} steps is {measured.loss_sum}: the adapter has diverged; lower "
                "training.lr, or set max_grad_norm"
            )
        row = EvaluationRow(step=steps_done, loss=measured.loss)
        stopping = context.spec.training.early_stopping
        min_delta = 0.0 if stopping is None else stopping.min_delta
        rows = [r for r in context.store.evaluations(context.job_id) if r.step != steps_done]
        best = judge_evaluations([*rows, row], min_delta=min_delta)
        if context.spec.training.keep_best and best.step == steps_done:
            await self._store_shadow_now(steps_done)
        seen = Evaluated(
            step=steps_done, loss=row.loss, is_best=best.step == steps_done, seconds=time.monotonic() - started_s
        )
        await context.apply(job_events.Evaluated(best=best), evaluation=row, events=[seen])
        crash_point("evaluation_stored")

    async def _store_shadow_now(self, steps_done: int) -> None:
        """The best state so far must be durable before it is called the best."""
        context = self._context
        context.workers.tell(pb.WorkerCommand(take_shadow=pb.TakeShadow(step=steps_done)), key="take_shadow")
        await context.workers.wait(lambda: steps_done in context.durable())
        context.workers.forget("take_shadow")

    def _done_reason(self) -> str | None:
        record = self._context.record
        stopping = self._context.spec.training.early_stopping
        if stopping is not None and record.evaluations_since_best >= stopping.patience:
            return (
                f"stopped early after {record.next_step} of {record.total_steps} steps: the evaluation loss has not "
                f"fallen for {record.evaluations_since_best} evaluations"
            )
        if record.next_step >= record.end_step:
            return f"all {record.next_step} steps are done"
        return None

    # ---- one step ----

    async def _feed(self, step: int) -> None:
        if step in self._fed:
            return
        last_known = self._rows.last_known(step, self._context.record.end_step)
        for ahead in range(step, min(step + _BATCHES_AHEAD, last_known)):
            if ahead not in self._batches:
                self._batches[ahead] = asyncio.create_task(self._rows.batch(ahead))
        record = self._context.record
        recorded = is_recorded(step, start_step=record.start_step, end_step=record.end_step)
        feed(self._context, Unit(UnitKind.TRAIN, step), await self._batches[step], is_recorded=recorded)
        self._fed.add(step)
        crash_point("step_fed")

    async def _decide(self, step: int) -> None:
        context = self._context
        batch = self._batches[step].result()
        barrier = await self._votes(step, batch)
        voted_s = time.monotonic()
        crash_point("votes_complete")
        decision = decide(barrier, context.spec.training.max_grad_norm)
        assert decision is not None, "all workers have voted"
        if isinstance(decision, Abort):
            await self._skip(step, batch, decision)
        else:
            await self._commit(step, batch, decision, voted_s)
        end_unit(context, Unit(UnitKind.TRAIN, step))
        del self._batches[step]

    async def _votes(self, step: int, batch: Batch) -> Barrier:
        context = self._context
        barrier = open_barrier(step=step, workers=context.refs(), loss_weight=batch.loss_weight)

        def have_all() -> bool:
            return all(s.vote is not None and s.vote.step == step for s in context.workers.statuses)

        await context.workers.wait(have_all)
        for status in context.workers.statuses:
            barrier = barrier.add_vote(vote_of(status))
        return barrier

    async def _commit(self, step: int, batch: Batch, decision: Commit, voted_s: float) -> None:
        context = self._context
        lr = learning_rate(step, context.spec.training, context.record.total_steps)
        times = tuple(times_of(context, status) for status in context.workers.statuses)
        row = LedgerRow(
            step=step,
            plan_epoch=context.record.plan_epoch,
            status=LedgerStatus.COMMITTED,
            sample_indices=batch.sample_indices,
            loss=decision.loss,
            grad_norm=decision.total_norm,
            clip_scale=decision.clip_scale,
            lr=lr,
        )
        await context.apply(job_events.StepCommitted(step=step), ledger_row=row)
        crash_point("step_row_stored")
        stored_s = time.monotonic()
        self._tell_commit(step, decision.clip_scale)
        crash_point("commit_sent")
        seen = StepCommitted(
            step=step,
            plan_epoch=row.plan_epoch,
            loss=decision.loss,
            grad_norm=decision.total_norm,
            clip_scale=decision.clip_scale,
            lr=lr,
            tokens=batch.num_tokens,
            label_tokens=batch.num_label_tokens,
            seconds=stored_s - self._last_decision_s,
            commit_s=stored_s - voted_s,
            workers=times,
            counts=counts_of(context.workers.statuses, self._rows.counts),
        )
        self._step_s = seen.seconds
        self._last_decision_s = stored_s
        # What people see is written behind the workers' backs: nothing of the next step waits for it.
        context.tell_later(seen)
        self._tell_of_full_caches()
        self._replanner.note(times)

    def _tell_of_full_caches(self) -> None:
        context = self._context
        for status in context.workers.statuses:
            if status.is_cache_full or status.vote is None or not status.vote.times.left_out_rows:
                continue
            status.is_cache_full = True
            name = context.worker_name(status.ref)
            text = (
                f"the activation cache of {name.device_name} has no more room: rows that are left out run through its "
                "blocks in every epoch; give the device more (--activation-cache), or choose a smaller "
                "training.activation_cache (int8, int4)"
            )
            context.tell_later(Notice(level="warning", text=text))

    def _tell_commit(self, step: int, clip_scale: float) -> None:
        context = self._context
        every = shadow_every(context.spec.training.shadow_every, step_s=self._step_s, upload_s=context.slowest_upload_s)
        due = shadow_due(step + 1, context.record.end_step, every)
        commit = pb.Commit(plan_epoch=context.record.plan_epoch, step=step, clip_scale=clip_scale, shadow=due)
        command = pb.WorkerCommand(commit=commit)
        refs = list(context.refs())
        context.workers.tell(command, key=f"decision {step}", only=refs[:1])
        crash_point("commit_half_sent")
        context.workers.tell(command, key=f"decision {step}", only=refs)
        context.workers.forget(f"decision {step - 1}")

    async def _skip(self, step: int, batch: Batch, decision: Abort) -> None:
        context = self._context
        if decision.kind is AbortKind.SPLIT_BRAIN:
            raise JobError(decision.reason)
        row = LedgerRow(
            step=step,
            plan_epoch=context.record.plan_epoch,
            status=LedgerStatus.SKIPPED,
            sample_indices=batch.sample_indices,
            reason=decision.reason,
        )
        seen = StepSkipped(step=step, plan_epoch=row.plan_epoch, reason=decision.reason)
        await context.apply(job_events.StepSkipped(step=step, reason=decision.reason), ledger_row=row, events=[seen])
        abort = pb.Abort(plan_epoch=row.plan_epoch, step=step, reason=decision.reason)
        context.workers.tell(pb.WorkerCommand(abort=abort), key=f"decision {step}")
        context.workers.forget(f"decision {step - 1}")


def repeat_last_decision(context: JobContext) -> None:
    """Workers that voted on a step that is decided already must hear of it, from its row.

    An attempt that was interrupted, here or before a restart, may have written a decision and told nobody.
    """
    rows = [row for row in context.store.ledger(context.job_id) if row.plan_epoch == context.record.plan_epoch]
    if not rows:
        return
    row = max(rows, key=lambda row: row.step)
    if row.status is LedgerStatus.SKIPPED:
        decision = pb.WorkerCommand(abort=pb.Abort(plan_epoch=row.plan_epoch, step=row.step, reason=row.reason))
    else:
        is_last = row.step + 1 == context.record.end_step
        decision = pb.WorkerCommand(
            commit=pb.Commit(plan_epoch=row.plan_epoch, step=row.step, clip_scale=row.clip_scale or 1.0, shadow=is_last)
        )
    context.workers.tell(decision, key=f"decision {row.step}")
