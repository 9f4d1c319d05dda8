from __future__ import annotations

from dataclasses import replace

import pytest

from coordinator.jobs import events
from coordinator.jobs.commands import (
    BeginSteps,
    Command,
    ReleaseReservation,
    Replan,
    StartWorkers,
    StopRunner,
    StopWorkers,
    standing_commands,
)
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
from coordinator.jobs.state import TRANSITIONS, transition
from plutino.errors import InvalidTransitionError, JobError
from plutino.types import JobId

JOB = JobId("job-1")
LIVE_STATES = [state for state in JobState if state not in TERMINAL_STATES]
SAMPLES: dict[type[Event], Event] = {
    type(event): event
    for event in (
        DataPrepared(total_steps=10),
        Queued(reason="job-0 holds 3 GiB"),
        Planned(plan_json="{}", numerics_json="{}"),
        AllLoaded(parameter_names=("a", "b")),
        StepCommitted(step=4),
        StepSkipped(step=4, reason="stage 1.0: inf"),
        Evaluated(best=BestSoFar(step=4, loss=0.5)),
        PauseRequested(),
        ResumeRequested(),
        Interrupted(reason="link 0-1 broke"),
        WorkersLost(next_step=2, best=BestSoFar(), reason="pi-3 left"),
        Parked(reason="one device is left"),
        MoveDecided(reason="pi-3 is slow"),
        TrainingDone(reason="all steps are done"),
        Exported(adapter_dir="/a"),
        CancelRequested(),
        Failed(reason="disk full"),
    )
}
NEEDS_NO_PLAN = {
    (JobState.RECOVERING, Planned),
    (JobState.RECOVERING, Parked),
    (JobState.PARKED, Planned),
    (JobState.PARKED, Parked),
}
PAIRS = [(state, event) for state in JobState for event in SAMPLES]


def record_in(state: JobState, *, plan_json: str | None = "{}") -> JobRecord:
    return JobRecord(
        job_id=JOB,
        name="job",
        spec_json="{}",
        submitted_at_s=0.0,
        state=state,
        plan_json=plan_json,
        next_step=4,
        total_steps=10,
    )


def apply(record: JobRecord, *happened: Event) -> tuple[JobRecord, tuple[Command, ...]]:
    commands: tuple[Command, ...] = ()
    for event in happened:
        result = transition(record, event, now_s=7.0)
        record, commands = result.record, result.commands
    return record, commands


def test_samples_cover_every_event_class() -> None:
    classes = {each for each in vars(events).values() if isinstance(each, type) and issubclass(each, Event)}

    assert set(SAMPLES) == classes - {Event}
    assert {event for _, event in TRANSITIONS} == set(SAMPLES)


@pytest.mark.parametrize(("state", "event"), [pair for pair in PAIRS if pair in TRANSITIONS])
def test_transition_of_allowed_pair_keeps_identity_and_progress_consistent(state: JobState, event: type[Event]) -> None:
    before = record_in(state, plan_json=None if (state, event) in NEEDS_NO_PLAN else "{}")

    after, _ = apply(before, SAMPLES[event])

    assert after.job_id == before.job_id
    assert after.plan_epoch >= before.plan_epoch
    assert after.next_step >= before.next_step or after.plan_epoch > before.plan_epoch
    assert (after.ended_at_s is not None) == after.is_terminal


@pytest.mark.parametrize(("state", "event"), [pair for pair in PAIRS if pair not in TRANSITIONS])
def test_transition_of_forbidden_pair_names_state_event_and_alternatives(state: JobState, event: type[Event]) -> None:
    with pytest.raises(InvalidTransitionError) as caught:
        transition(record_in(state), SAMPLES[event], now_s=0.0)

    assert state.value in str(caught.value)
    assert event.__name__ in str(caught.value)
    assert "CancelRequested" in str(caught.value) or state in TERMINAL_STATES


@pytest.mark.parametrize("state", LIVE_STATES)
def test_cancel_from_every_live_state_frees_everything(state: JobState) -> None:
    after, commands = apply(record_in(state), CancelRequested())

    assert after.state is JobState.CANCELLED
    assert after.ended_at_s == 7.0
    assert {type(command) for command in commands} == {StopWorkers, ReleaseReservation, StopRunner}


def test_transition_undisturbed_job_walks_to_success() -> None:
    record = replace(record_in(JobState.SUBMITTED, plan_json=None), next_step=0)

    after, _ = apply(
        record,
        DataPrepared(total_steps=1),
        Queued(reason="busy"),
        Planned(plan_json="p", numerics_json="n"),
        AllLoaded(parameter_names=("b", "a")),
        StepCommitted(step=0),
        TrainingDone(reason="1 of 1 steps"),
        Exported(adapter_dir="/out"),
    )

    assert (after.state, after.adapter_dir, after.plan_epoch) == (JobState.SUCCEEDED, "/out", 1)
    assert after.parameter_names == ("a", "b")


def test_transition_queued_keeps_planning_and_gives_no_command() -> None:
    after, commands = apply(record_in(JobState.PLANNING), Queued(reason="job-0 holds 3 GiB"))

    assert (after.state, after.reason, commands) == (JobState.PLANNING, "queued: job-0 holds 3 GiB", ())


def test_transition_workers_lost_fences_plan_and_returns_to_durable_step() -> None:
    after, commands = apply(record_in(JobState.RUNNING), SAMPLES[WorkersLost])

    assert (after.state, after.plan_epoch, after.recoveries) == (JobState.RECOVERING, 2, 1)
    assert (after.next_step, after.start_step, after.plan_json) == (2, 2, None)
    assert StopWorkers(job_id=JOB, before_epoch=2) in commands
    assert Replan(job_id=JOB, plan_epoch=2) in commands


def test_transition_recovery_loads_durable_step_and_runs_on() -> None:
    loading, commands = apply(record_in(JobState.RUNNING), SAMPLES[WorkersLost], SAMPLES[Planned])
    running, begin = apply(loading, SAMPLES[AllLoaded])

    assert StartWorkers(job_id=JOB, plan_epoch=2, restore_step=2) in commands
    assert running.state is JobState.RUNNING
    assert BeginSteps(job_id=JOB, plan_epoch=2, step=2) in begin


def test_transition_interrupted_keeps_plan_epoch_step_and_recoveries() -> None:
    before = record_in(JobState.RUNNING)

    after, _ = apply(before, SAMPLES[Interrupted])

    assert after == replace(before, state=JobState.RECOVERING, reason="link 0-1 broke")


def test_transition_lost_without_devices_parks_until_planned() -> None:
    parked, _ = apply(record_in(JobState.RUNNING), replace(SAMPLES[WorkersLost], is_parked=True))
    back, _ = apply(parked, SAMPLES[Planned])

    assert (parked.state, back.state) == (JobState.PARKED, JobState.RECOVERING)


def test_transition_loss_while_paused_stays_paused_and_resume_replans() -> None:
    paused, _ = apply(record_in(JobState.RUNNING), PauseRequested(), SAMPLES[WorkersLost])
    resumed, commands = apply(paused, ResumeRequested())

    assert (paused.state, resumed.state) == (JobState.PAUSED, JobState.RECOVERING)
    assert Replan(job_id=JOB, plan_epoch=2) in commands


def test_transition_loss_after_early_stop_trains_only_to_the_same_end() -> None:
    after, _ = apply(
        record_in(JobState.RUNNING),
        TrainingDone(reason="no progress for 3 evaluations"),
        SAMPLES[WorkersLost],
        SAMPLES[Planned],
        SAMPLES[AllLoaded],
    )

    assert (after.next_step, after.end_step, after.total_steps) == (2, 4, 10)


@pytest.mark.parametrize("event", [StepCommitted(step=5), StepCommitted(step=3), StepSkipped(step=9, reason="nan")])
def test_transition_step_out_of_turn_is_refused(event: Event) -> None:
    with pytest.raises(JobError, match="next step is 4"):
        transition(record_in(JobState.RUNNING), event, now_s=0.0)


def test_transition_all_loaded_with_other_parameters_is_refused() -> None:
    before = replace(record_in(JobState.RECOVERING), parameter_names=("a", "c"))

    with pytest.raises(JobError, match=r"missing \['c'\], new \['b'\]"):
        transition(before, SAMPLES[AllLoaded], now_s=0.0)


def test_transition_second_plan_of_one_epoch_is_refused() -> None:
    with pytest.raises(JobError, match="has a plan"):
        transition(record_in(JobState.RECOVERING), SAMPLES[Planned], now_s=0.0)


@pytest.mark.parametrize("state", list(JobState))
def test_standing_commands_exist_for_every_state(state: JobState) -> None:
    commands = standing_commands(record_in(state))

    assert commands
    assert len(set(commands)) == len(commands)


def test_move_decided_keeps_every_step_and_begins_a_new_plan_epoch() -> None:
    before = replace(record_in(JobState.RUNNING), start_step=2, recoveries=1)

    after, commands = apply(before, MoveDecided(reason="pi-3 is slow"))

    assert (after.state, after.plan_json, after.plan_epoch) == (JobState.RECOVERING, None, before.plan_epoch + 1)
    assert (after.next_step, after.start_step, after.recoveries) == (4, 4, 1)
    assert any(isinstance(command, Replan) for command in commands)
    assert StopWorkers(job_id=JOB, before_epoch=after.plan_epoch) in commands
