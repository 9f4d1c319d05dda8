from __future__ import annotations

import pytest

from benchmarks.contender import StepFigures
from benchmarks.goals import Goal, goal_table
from benchmarks.measure import Figures
from benchmarks.pipeline import pipeline_document, pipeline_goals
from benchmarks.plutino_contender import seconds_by_stage
from plutino.events import StepCommitted, WorkerName, WorkerStepTimes


def figures(seconds):
    return Figures(name="any", turns=tuple((StepFigures(i, s, 9.0),) for i, s in enumerate(seconds)), facts={})


def committed(step, *, wait_s=0.0, commit_s=0.0):
    times = WorkerStepTimes(
        worker=WorkerName(stage_index=0, device_name="a"),
        total_s=1.0,
        compute_s=0.5,
        wait_s=wait_s,
        serialise_s=0.1,
        commit_s=commit_s,
        sent_bytes=0,
        rss_bytes=0,
        peak_rss_bytes=0,
    )
    return StepCommitted(
        step=step,
        plan_epoch=1,
        loss=9.0,
        grad_norm=1.0,
        clip_scale=1.0,
        lr=0.1,
        tokens=8,
        label_tokens=8,
        seconds=1.0,
        commit_s=0.0,
        workers=(times,),
    )


def document(one_process_s=2.0, torch_s=1.5, plutino_s=1.0, **others_s):
    measured = {"one_process": one_process_s, "torch_pipelining": torch_s, "plutino": plutino_s, **others_s}
    stages = [{"compute": 0.5, "wait": 0.25, "serialise": 0.125, "commit": 0.0625}] * 2
    return pipeline_document({key: figures([s, s]) for key, s in measured.items()}, stages, tokens_per_step=100)


def test_pipeline_document_ratios_are_above_one_where_plutino_is_faster():
    values = document()

    assert values["tokens_per_s"] == {"one_process": 50.0, "torch_pipelining": 100 / 1.5, "plutino": 100.0}
    assert (values["ratio_to_one_process"], values["ratio_to_torch_pipelining"]) == (2.0, 1.5)
    assert values["per_step_seconds"]["wait"] == [0.25, 0.25]


def test_pipeline_document_faster_kind_of_one_process_counts():
    assert document(one_process_s=3.0, one_process_micro_batches=2.5)["ratio_to_one_process"] == 2.5


def test_pipeline_goals_slower_than_torch_is_missed():
    goals = pipeline_goals(document(one_process_s=2.0, torch_s=0.9, plutino_s=1.0))

    assert [goal.is_met for goal in goals] == [False, True]


def test_seconds_by_stage_commit_of_the_step_that_held_the_pause_is_left_out():
    turns = [[committed(4, wait_s=0.2, commit_s=30.0), committed(5, wait_s=0.2, commit_s=0.01)]] * 3

    (stage,) = seconds_by_stage(turns)

    assert stage == {"compute": 0.5, "wait": 0.2, "serialise": 0.1, "commit": 0.01}


@pytest.mark.parametrize(("measured", "is_met"), [(0.89, False), (0.9, True), (1.0, True), (1.01, False)])
def test_goal_with_two_bounds_is_met_between_them(measured, is_met):
    assert Goal(name="ratio", measured=measured, at_least=0.9, at_most=1.0).is_met is is_met


def test_goal_table_missed_goal_stands_out():
    text = goal_table([Goal(name="supervisor", measured=90.0, unit="MiB", at_most=80.0)])

    assert text.splitlines()[1].split() == ["supervisor", "90.000", "<=", "80", "MiB:", "MISSED"]
