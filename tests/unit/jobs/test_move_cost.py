from __future__ import annotations

import pytest

from coordinator.jobs.move_cost import STOP_S, LoadingTimes, StageLoad, move_cost_s
from partitioner.device import LinkProfile, LinkTable
from partitioner.plan import Plan
from tests.unit.jobs.test_replanning import plan_over, problem_of
from tests.unit.partitioner.fleet import job, llama

BANDWIDTH = 1e8
PROBLEM = problem_of(
    1,
    1,
    1,
    num_blocks=4,
    allow_replicas=False,
    shape=job(llama(4), exact_stages=1),
    links=LinkTable(other=LinkProfile(bandwidth_bytes_per_s=BANDWIDTH, latency_s=1e-3)),
)


def loading(plan: Plan, seconds: float, *, around_s: float = 0.5, **places: int) -> LoadingTimes:
    stages = tuple(
        StageLoad(agent_id=agent, seconds=seconds, bytes_by_place=places or {"cache": 100}) for agent in plan.agent_ids
    )
    return LoadingTimes(total_s=seconds + around_s, stages=stages)


def weights_of(plan: Plan) -> int:
    return sum(item.bytes for stage in plan.stages for item in stage.memory if item.name == "weights")


def test_moving_to_a_device_without_weights_costs_what_it_must_fetch():
    present, elsewhere = plan_over(PROBLEM, 0), plan_over(PROBLEM, 1)

    here_s, there_s = (
        move_cost_s(present, new, PROBLEM, loading=loading(present, 2.0), upload_s=1.0) for new in (present, elsewhere)
    )

    assert here_s == pytest.approx(1.0 + STOP_S + 0.5 + 2.0)
    assert there_s - here_s == pytest.approx(weights_of(elsewhere) / BANDWIDTH)


def test_what_the_first_loading_fetched_is_not_paid_again_by_who_holds_it():
    present = plan_over(PROBLEM, 0)
    fetched_s = 7.0

    cost_s = move_cost_s(
        present,
        present,
        PROBLEM,
        loading=loading(present, 2.0 + fetched_s, the_coordinator=int(fetched_s * BANDWIDTH)),
        upload_s=0.0,
    )

    assert cost_s == pytest.approx(STOP_S + 0.5 + 2.0)


def test_agent_on_a_host_that_holds_the_blocks_fetches_nothing():
    first = PROBLEM.devices[0]
    neighbour = PROBLEM.devices[1].model_copy(update={"host_id": first.host_id})
    problem = PROBLEM.model_copy(update={"devices": (first, neighbour)})
    present, beside = plan_over(problem, 0), plan_over(problem, 1)

    here_s, there_s = (
        move_cost_s(present, new, problem, loading=loading(present, 2.0), upload_s=0.0) for new in (present, beside)
    )

    assert there_s == pytest.approx(here_s)


def test_fewer_blocks_load_sooner_and_a_device_that_became_slow_later():
    halves = PROBLEM.model_copy(update={"shape": job(llama(4), exact_stages=2)})
    whole, split = plan_over(PROBLEM, 0), plan_over(halves, 0, 1)
    times = loading(whole, 4.0, around_s=0.0)
    largest = max(stage.end_block - stage.start_block for stage in split.stages)
    fetched = sum(
        item.bytes
        for s in split.stages
        if s.agent_ids != whole.agent_ids
        for item in s.memory
        if item.name == "weights"
    )

    split_s = move_cost_s(whole, split, halves, loading=times, upload_s=0.0)
    slow_s = move_cost_s(whole, whole, PROBLEM, loading=times, upload_s=0.0, factors={whole.agent_ids[0]: 10.0})

    assert split_s == pytest.approx(STOP_S + 4.0 * largest / 4 + fetched / BANDWIDTH)
    assert slow_s == pytest.approx(STOP_S + 40.0)


def test_moving_costs_at_least_the_stop_where_nothing_was_seen_to_load():
    present = plan_over(PROBLEM, 0)

    assert move_cost_s(present, present, PROBLEM, loading=LoadingTimes(total_s=0.0), upload_s=0.0) == STOP_S
