"""When a job with an activation cache leaves its pipeline: pure decisions."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from coordinator.jobs.job_shape import CACHED_WAYS
from coordinator.jobs.phases import Phases, entry_owners, has_run_an_epoch, with_cached_step
from partitioner.plan import CachedStep, Plan, StagePlan
from plutino.job.data import DataConfig
from plutino.job.method import ParallelAdaptersConfig
from plutino.job.model import ModelConfig
from plutino.job.placement import PlacementConfig
from plutino.job.spec import JobSpec
from plutino.job.training import TrainingConfig

CACHED = CachedStep(step_s=2.0, agent_ids=("b", "a"), owners=(0, 1, 0), compute_s=1.5, read_s=0.3, reduce_s=0.2)
STAGED = CachedStep(
    step_s=3.0, in_stages=True, agent_ids=("a", "b"), owners=(), compute_s=2.5, read_s=0.3, reduce_s=0.0
)


def stage(index, agent_id):
    return StagePlan(
        stage_index=index,
        start_block=2 * index,
        end_block=2 * index + 2,
        agent_ids=(agent_id,),
        device_names=(agent_id,),
        forward_s=1.0,
        backward_s=1.0,
        memory=(),
        job_bytes=1,
        baseline_bytes=1,
        budget_bytes=10,
        threads=1,
    )


def plan(cached=CACHED):
    return Plan(
        stages=(stage(0, "a"), stage(1, "b")),
        micro_batch_rows=2,
        num_micro_batches=3,
        micro_batch_owners=((0, 0, 0), (0, 0, 0)),
        checkpointing=False,
        dtype="fp32",
        codec="raw",
        step_s=9.0,
        bubble_share=0.1,
        bottleneck="",
        relief="",
        cached=cached,
    )


def phases(cached_epochs="auto"):
    spec = JobSpec(
        model=ModelConfig(path="model"),
        method=ParallelAdaptersConfig(reduction=2),
        data=DataConfig(train="rows.jsonl"),
        training=TrainingConfig(batch_size=6, activation_cache="raw"),
        placement=PlacementConfig(cached_epochs=cached_epochs),
    )
    return Phases(spec)


def test_owners_of_places_are_workers_of_the_pipeline():
    assert entry_owners(plan()) == ((1, 0), (0, 0), (1, 0))
    assert entry_owners(plan(cached=None)) == ()
    assert entry_owners(plan(cached=STAGED)) == ()  # they stay with whoever made them


@pytest.mark.parametrize(
    ("next_step", "start_step", "expected"), [(4, 0, True), (3, 0, False), (8, 4, True), (8, 5, False), (8, 0, True)]
)
def test_epoch_counts_only_if_this_plan_ran_all_of_it(next_step, start_step, expected):
    assert has_run_an_epoch(next_step, start_step, epoch_steps=4) is expected


def test_job_stays_in_its_pipeline_until_entries_are_placed_and_the_move_is_worth_it(monkeypatch):
    monkeypatch.setattr("coordinator.jobs.phases.plan_from_cache", lambda plan, problem, spec: plan)
    problem = object()
    jobs = phases()
    jobs.begin_plan(problem, plan())

    jobs.note(2, 0, 12, [0, 3])
    assert jobs.leave_pipeline(100, move_s=1.0) is None  # a row was left out
    jobs.note(3, 0, 12, [0, 0])
    assert jobs.leave_pipeline(100, move_s=1.0) is None  # in the middle of an epoch
    jobs.note(4, 0, 12, [0, 0])
    assert jobs.leave_pipeline(9, move_s=1.0) is None  # 18 s from the cache, 2 s of moving
    assert "activation cache" in jobs.leave_pipeline(10, move_s=1.0)
    jobs.forget()
    assert jobs.leave_pipeline(100, move_s=1.0) is None


def test_job_that_was_told_to_keep_its_pipeline_trains_in_stages_and_never_leaves_it():
    jobs = phases("pipeline")
    jobs.begin_plan(object(), plan(cached=STAGED))
    jobs.note(2, 0, 12, [0, 0])

    assert not jobs.may_change_before(4, 0, 12)
    assert jobs.leave_pipeline(10**6, move_s=1e-9) is None


def test_job_that_was_told_to_leave_asks_for_no_price(monkeypatch):
    monkeypatch.setattr("coordinator.jobs.phases.plan_from_cache", lambda plan, problem, spec: plan)
    jobs = phases("data-parallel")
    jobs.begin_plan(object(), plan())
    jobs.note(2, 0, 12, [0, 0])

    assert jobs.leave_pipeline(1, move_s=1e9) is not None
    assert jobs.leave_pipeline(0, move_s=1e9) is None


@pytest.mark.parametrize(
    ("cached_epochs", "total_steps", "expected"),
    [
        ("auto", 5, CACHED),
        ("auto", 4, STAGED),
        ("auto", 2, None),
        ("data-parallel", 3, CACHED),
        ("data-parallel", 2, None),
        ("stages", 12, STAGED),
        ("pipeline", 12, STAGED),
    ],
)
def test_entries_are_handed_over_only_where_the_job_could_leave_its_pipeline(
    monkeypatch, cached_epochs, total_steps, expected
):
    found = {("data-parallel",): CACHED, ("stages", "data-parallel"): CACHED, ("stages",): STAGED, (): None}
    monkeypatch.setattr("coordinator.jobs.phases._cached_step", lambda plan, running, ways: found[ways])
    running = SimpleNamespace(shape=SimpleNamespace(cached_ways=CACHED_WAYS[cached_epochs]))
    monkeypatch.setattr("coordinator.jobs.phases.as_running", lambda problem, plan: running)
    problem = SimpleNamespace(num_train_rows=12)
    spec = phases(cached_epochs)._spec

    assert with_cached_step(plan(), problem, spec, total_steps=total_steps).cached == expected
