"""The life of a job as one table: (state, event) -> record.

Entry point: :func:`transition` (pure). Its result is written to the store before its commands run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from coordinator.jobs.commands import Command, standing_commands
from coordinator.jobs.events import (
    AllLoaded,
    CancelRequested,
    DataPrepared,
    Evaluated,
    Event,
    Exported,
    Failed,
    Interrupted,
    MoveDecided,
    Parked,
    PauseRequested,
    Planned,
    Queued,
    ResumeRequested,
    StepCommitted,
    StepSkipped,
    TrainingDone,
    WorkersLost,
)
from coordinator.jobs.lineage import BestSoFar
from coordinator.jobs.record import TERMINAL_STATES, JobRecord, JobState
from plutino.errors import InvalidTransitionError, JobError


@dataclass(frozen=True, slots=True, kw_only=True)
class Transition:
    """The record after an event, and what to do once it is stored."""

    record: JobRecord
    commands: tuple[Command, ...]


def transition(record: JobRecord, event: Event, *, now_s: float) -> Transition:
    """The job after an event.

    Commands come with every change of state or of plan, never with events that leave both as they are.

    Raises:
        InvalidTransitionError: the job's state does not allow the event.
        JobError: the event contradicts the record (a wrong step, other parameters than before).
    """
    handler = TRANSITIONS.get((record.state, type(event)))
    if handler is None:
        raise InvalidTransitionError(
            f"job {record.job_id} is {record.state.value}: {type(event).__name__} is not possible; "
            f"possible are {', '.join(allowed_events(record.state)) or 'no events, the job has ended'}"
        )
    after = handler(record, event)
    if after.is_terminal:
        after = replace(after, ended_at_s=now_s)
    changed = (after.state, after.plan_epoch, after.plan_json) != (record.state, record.plan_epoch, record.plan_json)
    return Transition(record=after, commands=standing_commands(after) if changed else ())


def allowed_events(state: JobState) -> tuple[str, ...]:
    """Names of the events that a state allows, sorted."""
    return tuple(sorted(event.__name__ for from_state, event in TRANSITIONS if from_state is state))


def _on_data_prepared(record: JobRecord, event: DataPrepared) -> JobRecord:
    return replace(record, state=JobState.PLANNING, reason="a plan is being made", total_steps=event.total_steps)


def _on_queued(record: JobRecord, event: Queued) -> JobRecord:
    return replace(record, reason=f"queued: {event.reason}")


def _on_first_plan(record: JobRecord, event: Planned) -> JobRecord:
    return replace(
        record,
        state=JobState.LOADING,
        reason="workers load their stages",
        plan_json=event.plan_json,
        numerics_json=event.numerics_json,
    )


def _on_new_plan(record: JobRecord, event: Planned) -> JobRecord:
    if record.plan_json is not None:
        raise JobError(f"job {record.job_id} has a plan of epoch {record.plan_epoch} already; only a loss ends a plan")
    return replace(
        record,
        state=JobState.RECOVERING,
        reason=f"workers load step {record.start_step}",
        plan_json=event.plan_json,
        numerics_json=event.numerics_json,
    )


def _on_all_loaded(record: JobRecord, event: AllLoaded) -> JobRecord:
    if record.plan_json is None:
        raise JobError(
            f"job {record.job_id} has no plan in plan epoch {record.plan_epoch}; its workers cannot have loaded"
        )
    names = tuple(sorted(event.parameter_names))
    if record.parameter_names and names != record.parameter_names:
        before, now = set(record.parameter_names), set(names)
        raise JobError(
            f"job {record.job_id}: the workers of plan epoch {record.plan_epoch} hold other parameters than those "
            f"before: missing {sorted(before - now)[:3]}, new {sorted(now - before)[:3]}; "
            "all devices must run the same versions"
        )
    return replace(record, state=JobState.RUNNING, reason="", parameter_names=names)


def _on_step(record: JobRecord, event: StepCommitted | StepSkipped) -> JobRecord:
    if event.step != record.next_step:
        raise JobError(f"job {record.job_id}: step {event.step} was decided, but the next step is {record.next_step}")
    return replace(record, next_step=event.step + 1)


def _on_evaluated(record: JobRecord, event: Evaluated) -> JobRecord:
    return _with_best(record, event.best)


def _on_pause(record: JobRecord, event: PauseRequested) -> JobRecord:
    return replace(record, state=JobState.PAUSED, reason="paused; resume makes it go on")


def _on_resume(record: JobRecord, event: ResumeRequested) -> JobRecord:
    if record.plan_json is None:
        return replace(record, state=JobState.RECOVERING, reason="resumed; a new plan is being made")
    return replace(record, state=JobState.RUNNING, reason="")


def _on_interrupted(record: JobRecord, event: Interrupted) -> JobRecord:
    return replace(record, state=JobState.RECOVERING, reason=event.reason)


def _on_interrupted_while_still(record: JobRecord, event: Interrupted) -> JobRecord:
    return replace(record, reason=event.reason)


def _on_workers_lost(record: JobRecord, event: WorkersLost) -> JobRecord:
    return replace(
        _fenced(record, event),
        state=JobState.PARKED if event.is_parked else JobState.RECOVERING,
    )


def _on_workers_lost_while_paused(record: JobRecord, event: WorkersLost) -> JobRecord:
    return replace(_fenced(record, event), state=JobState.PAUSED)


def _on_move(record: JobRecord, event: MoveDecided) -> JobRecord:
    return replace(
        record,
        state=JobState.RECOVERING,
        reason=event.reason,
        plan_json=None,
        plan_epoch=record.plan_epoch + 1,
        start_step=record.next_step,
    )


def _on_parked(record: JobRecord, event: Parked) -> JobRecord:
    if record.plan_json is not None:
        raise JobError(f"job {record.job_id} has a plan of epoch {record.plan_epoch}; only a job without one is parked")
    return replace(record, state=JobState.PARKED, reason=event.reason)


def _on_training_done(record: JobRecord, event: TrainingDone) -> JobRecord:
    return replace(record, state=JobState.FINALIZING, reason=event.reason, final_step=record.next_step)


def _on_exported(record: JobRecord, event: Exported) -> JobRecord:
    return replace(record, state=JobState.SUCCEEDED, reason="", adapter_dir=event.adapter_dir)


def _on_cancel(record: JobRecord, event: CancelRequested) -> JobRecord:
    return replace(record, state=JobState.CANCELLED, reason=event.reason)


def _on_failed(record: JobRecord, event: Failed) -> JobRecord:
    return replace(record, state=JobState.FAILED, reason=event.reason)


def _fenced(record: JobRecord, event: WorkersLost) -> JobRecord:
    if event.next_step > record.next_step:
        raise JobError(f"job {record.job_id} cannot return to step {event.next_step}: it is at {record.next_step}")
    fenced = replace(
        record,
        reason=event.reason,
        plan_json=None,
        plan_epoch=record.plan_epoch + 1,
        recoveries=record.recoveries + 1,
        start_step=event.next_step,
        next_step=event.next_step,
    )
    return _with_best(fenced, event.best)


def _with_best(record: JobRecord, best: BestSoFar) -> JobRecord:
    return replace(record, best_step=best.step, best_eval_loss=best.loss, evaluations_since_best=best.evaluations_since)


TRANSITIONS: dict[tuple[JobState, type[Event]], Callable[[JobRecord, Any], JobRecord]] = {
    (JobState.SUBMITTED, DataPrepared): _on_data_prepared,
    (JobState.PLANNING, Queued): _on_queued,
    (JobState.PLANNING, Planned): _on_first_plan,
    (JobState.LOADING, AllLoaded): _on_all_loaded,
    (JobState.LOADING, WorkersLost): _on_workers_lost,
    (JobState.RUNNING, StepCommitted): _on_step,
    (JobState.RUNNING, StepSkipped): _on_step,
    (JobState.RUNNING, Evaluated): _on_evaluated,
    (JobState.RUNNING, PauseRequested): _on_pause,
    (JobState.RUNNING, Interrupted): _on_interrupted,
    (JobState.RUNNING, WorkersLost): _on_workers_lost,
    (JobState.RUNNING, TrainingDone): _on_training_done,
    (JobState.RUNNING, MoveDecided): _on_move,
    (JobState.RECOVERING, Queued): _on_queued,
    (JobState.RECOVERING, Planned): _on_new_plan,
    (JobState.RECOVERING, AllLoaded): _on_all_loaded,
    (JobState.RECOVERING, Interrupted): _on_interrupted_while_still,
    (JobState.RECOVERING, WorkersLost): _on_workers_lost,
    (JobState.RECOVERING, Parked): _on_parked,
    (JobState.PARKED, Queued): _on_queued,
    (JobState.PARKED, Parked): _on_parked,
    (JobState.PARKED, Planned): _on_new_plan,
    # The step that was under way when the pause came is still decided.
    (JobState.PAUSED, StepCommitted): _on_step,
    (JobState.PAUSED, StepSkipped): _on_step,
    (JobState.PAUSED, Evaluated): _on_evaluated,
    (JobState.PAUSED, Interrupted): _on_interrupted_while_still,
    (JobState.PAUSED, WorkersLost): _on_workers_lost_while_paused,
    (JobState.PAUSED, ResumeRequested): _on_resume,
    (JobState.FINALIZING, Evaluated): _on_evaluated,
    (JobState.FINALIZING, Interrupted): _on_interrupted,
    (JobState.FINALIZING, WorkersLost): _on_workers_lost,
    (JobState.FINALIZING, Exported): _on_exported,
    **{(state, CancelRequested): _on_cancel for state in JobState if state not in TERMINAL_STATES},
    **{(state, Failed): _on_failed for state in JobState if state not in TERMINAL_STATES},
}
