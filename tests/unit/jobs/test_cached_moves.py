"""Whether a job with an activation cache takes in a device that joined: pure decisions."""

from __future__ import annotations

import pytest

from coordinator.jobs.cached_moves import cached_choice, mean_step_s, pipeline_steps
from coordinator.jobs.phases import plan_from_cache, with_cached_step
from coordinator.jobs.replanning import Move, Stay, decide_move
from coordinator.scheduling.problem import PlanningProblem
from partitioner.device import LinkProfile, LinkTable
from plutino.job.data import DataConfig
from plutino.job.method import LoraConfig, ParallelAdaptersConfig
from plutino.job.model import ModelConfig
from plutino.job.placement import PlacementConfig
from plutino.job.spec import JobSpec
from plutino.job.training import TrainingConfig
from tests.unit.partitioner.fleet import device, job, llama

EPOCH_STEPS, TOTAL_STEPS = 4, 400
SIDE, UPPER = ParallelAdaptersConfig(reduction=4), LoraConfig(blocks="last 4")


def spec_of(method):
    return JobSpec(
        model=ModelConfig(path="model"),
        method=method,
        data=DataConfig(train="rows.jsonl"),
        training=TrainingConfig(batch_size=16, activation_cache="raw"),
        placement=PlacementConfig(cached_epochs="data-parallel"),
    )


def problem_of(method, *names):
    table = llama(8)
    share = TOTAL_STEPS / EPOCH_STEPS - 1
    changes = {"batch_rows": 16, "micro_batch_rows": 2, "cached_steps_share": share, "entry_token_bytes": 256}
    if method is UPPER:
        changes["frozen_share"] = 1 / (1 + share)
    return PlanningProblem(
        job_id="job",
        table=table,
        shape=job(table, method, **changes),
        is_micro_batch_free=False,
        label_tokens_per_row=20,
        devices=tuple(device(name) for name in names),
        links=LinkTable(other=LinkProfile(bandwidth_bytes_per_s=125e6)),
        num_train_rows=16 * EPOCH_STEPS,
    )


def choice_of(method, *, next_step, end_step=TOTAL_STEPS, in_cache=True):
    """A third device joins two."""
    spec = spec_of(method)
    before, after = problem_of(method, "a", "b"), problem_of(method, "a", "b", "c")
    present = with_cached_step(before.plan(), before, spec, total_steps=TOTAL_STEPS)
    if in_cache:
        present = plan_from_cache(present, before, spec)
    return cached_choice(
        present,
        after.plan(),
        after,
        spec,
        next_step=next_step,
        start_step=0,
        end_step=end_step,
        total_steps=TOTAL_STEPS,
        move_s=3.0,
        now_s=1000.0,
        last_move_s=None,
    )


@pytest.mark.parametrize(
    ("next_step", "start_step", "expected"), [(0, 0, 4), (3, 0, 1), (9, 0, 0), (9, 9, 7), (8, 8, 4), (9, 6, 3)]
)
def test_pipeline_runs_until_it_has_had_a_whole_epoch(next_step, start_step, expected):
    assert pipeline_steps(next_step, start_step, EPOCH_STEPS) == expected


def test_job_without_backbone_takes_a_device_in_for_a_long_rest_and_pays_for_two_moves():
    choice = choice_of(SIDE, next_step=9)

    assert choice.move_s == 6.0
    assert choice.new_step_s < choice.step_s
    assert isinstance(decide_move(choice), Move)


def test_job_whose_rest_is_hardly_longer_than_another_epoch_stays_without_its_backbone():
    short, long = (choice_of(SIDE, next_step=9, end_step=end_step) for end_step in (20, TOTAL_STEPS))

    assert short.new_step_s > long.new_step_s  # seven of eleven steps would run through the blocks
    assert isinstance(decide_move(short), Stay)


def test_rest_that_ends_before_the_job_could_leave_its_pipeline_again_is_one_move_and_no_gain():
    choice = choice_of(SIDE, next_step=9, end_step=16)

    assert choice.move_s == 3.0
    assert isinstance(decide_move(choice), Stay)


@pytest.mark.parametrize("method", [SIDE, UPPER], ids=["side", "upper"])
def test_job_in_its_pipeline_compares_epochs_of_both_kinds(method):
    early, late = (choice_of(method, next_step=step, in_cache=False) for step in (1, 100))

    assert early.move_s == late.move_s == 3.0
    # What is left of the present plan's first epoch is dear.
    assert early.step_s > late.step_s > late.new_step_s
    assert isinstance(decide_move(late), Move)


def test_plan_without_a_cache_behind_it_costs_its_own_seconds_throughout():
    plan = problem_of(LoraConfig(), "a").plan()

    assert mean_step_s(plan, 2.0, 10, 4) == 2.0
