"""A seeded sample of what the planner's benchmark does in full."""

from __future__ import annotations

import pytest

from benchmarks.planner import against_pac, budgets, goals_of, optimality
from benchmarks.planner_cases import budgets_share, optimality_share, over_budget, pac_share, run_shares
from partitioner.search import search
from tests.unit.partitioner.fleet import device, job, llama


def test_sample_of_fleets_never_goes_over_a_budget_with_replicas_or_without():
    found = budgets([budgets_share(seed, 12) for seed in range(2)])

    assert found["over_budget"] == 0
    assert found["planned_with_replicas"] > 0 and found["planned"] > found["planned_with_replicas"]


def test_bill_made_anew_finds_a_device_that_shrank_after_the_plan():
    table = llama(4)
    shape, devices = job(table), [device("a"), device("b")]
    plan = search(table, shape, devices)
    small = [d.model_copy(update={"available_bytes": d.baseline_bytes + 1}) for d in devices]

    assert over_budget(plan, table, shape, devices) == []
    assert over_budget(plan, table, shape, small) == [name for stage in plan.stages for name in stage.device_names]


def test_sample_of_small_cases_is_optimal_and_of_fleets_faster_than_pac():
    optimal = optimality([optimality_share(0, 3)])
    pac = against_pac([pac_share(0, 2)])

    goals = goals_of({"optimality": optimal, "against_pac": pac})

    assert optimal["cases"] == 3 and pac["fleets"] == 2
    assert all(goal.is_met for goal in goals if "optimum" in goal.name)


@pytest.mark.slow
def test_shares_give_the_same_figures_however_many_processes_work():
    alone, together = ([*run_shares(budgets_share, 12, 4, workers)][-1] for workers in (1, 2))

    assert alone == together == [budgets_share(seed, 4) for seed in range(3)]
