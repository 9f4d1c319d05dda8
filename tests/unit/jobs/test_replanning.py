from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.jobs.replanning import (
    GAIN_FACTOR,
    GAIN_SHARE,
    MIN_INTERVAL_S,
    WARM_UP_STEPS,
    WINDOW_STEPS,
    Choice,
    Move,
    Pace,
    Stay,
    as_running,
    corrected,
    decide_move,
    have_changed,
    may_move,
    moves_in_words,
    planned_compute_s,
    step_s_of,
    why_in_words,
)
from coordinator.scheduling.problem import PlanningProblem
from partitioner.device import LinkProfile, LinkTable
from partitioner.plan import Plan
from tests.unit.partitioner.fleet import device, job, llama

SETTLED = WARM_UP_STEPS + WINDOW_STEPS


def problem_of(*speeds: float, num_blocks: int = 8, **changes: object) -> PlanningProblem:
    table = llama(num_blocks)
    values = {
        "job_id": "job",
        "table": table,
        "shape": job(table, micro_batch_rows=1),
        "is_micro_batch_free": False,
        "label_tokens_per_row": 20,
        "devices": tuple(device(f"d{i}", speed=speed, available_mib=420) for i, speed in enumerate(speeds)),
        "links": LinkTable(other=LinkProfile(bandwidth_bytes_per_s=1e8, latency_s=1e-3)),
        "allow_replicas": True,
    }
    return PlanningProblem(**{**values, **changes})


def plan_over(problem: PlanningProblem, *positions: int) -> Plan:
    """The best plan over some of the devices."""
    return problem.model_copy(update={"devices": tuple(problem.devices[i] for i in positions)}).plan()


def choice(**changes: object) -> Choice:
    values = {"now_s": 1000.0, "last_move_s": None, "steps_left": 100, "step_s": 2.0, "new_step_s": 1.0, "move_s": 10.0}
    return Choice(**{**values, **changes})


def test_job_moves_where_the_rest_gains_more_than_moving_costs():
    decision = decide_move(choice())

    assert isinstance(decision, Move)
    assert "1 s instead of 2 s" in decision.reason and "100 steps left gain 100 s, moving costs 10 s" in decision.reason


@pytest.mark.parametrize(
    "changes",
    [
        {"new_step_s": 2.0 * (1 - GAIN_SHARE) + 0.01},
        {"steps_left": int(GAIN_FACTOR * 10) - 1},
        {"new_step_s": 3.0},
        {"last_move_s": 1000.0 - MIN_INTERVAL_S + 1},
    ],
    ids=["little", "nearly-done", "slower", "just-moved"],
)
def test_job_stays_with_its_plan(changes):
    assert isinstance(decide_move(choice(**changes)), Stay)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.05, 5.0))
def test_speeds_that_swing_by_30_percent_move_a_job_at_most_once_in_five_minutes(seed, step_s):
    generator = random.Random(seed)
    pace, seen, moves, last_move_s = Pace(), {}, [], None
    pace.begin_plan()
    for step in range(400):
        now_s = step * step_s
        pace.note({name: 1.1 * generator.uniform(0.7, 1.3) for name in "abc"})
        factors = pace.factors()
        if not may_move(now_s, last_move_s) or not have_changed(factors, seen):
            continue
        seen = factors
        # At worst, all of what seems to have changed could be gained.
        decision = decide_move(
            choice(
                now_s=now_s,
                last_move_s=last_move_s,
                steps_left=400 - step,
                step_s=max(factors.values(), default=1.0),
                new_step_s=min(factors.values(), default=1.0) / 2,
                move_s=0.0,
            )
        )
        if isinstance(decision, Move):
            last_move_s, seen = now_s, {}
            moves.append(now_s)
            pace.begin_plan()

    assert all(later - earlier >= MIN_INTERVAL_S for earlier, later in pairwise(moves))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(0.0, 400.0), st.floats(0.01, 10), st.floats(0.01, 10)), max_size=30))
def test_moves_are_never_closer_than_five_minutes_whatever_is_priced(numbers):
    now_s, last_move_s = 0.0, None
    for wait_s, step_s, new_step_s in numbers:
        now_s += wait_s
        case = choice(now_s=now_s, last_move_s=last_move_s, step_s=step_s, new_step_s=new_step_s, move_s=0.0)
        if isinstance(decide_move(case), Move):
            assert last_move_s is None or now_s - last_move_s >= MIN_INTERVAL_S
            last_move_s = now_s


def test_pace_that_all_workers_share_is_no_change():
    pace = Pace()
    pace.begin_plan()
    for _ in range(3 * SETTLED):
        pace.note({"a": 3.0, "b": 3.3})

    assert pace.factors() == {}


@pytest.mark.parametrize("workers", [("a",), ("a", "b"), ("a", "b", "c")])
@pytest.mark.parametrize("factor", [10.0, 0.1])
def test_pace_of_a_device_that_changes_is_seen_after_half_a_window(workers, factor):
    pace = Pace()
    pace.begin_plan()
    for _ in range(SETTLED):
        pace.note(dict.fromkeys(workers, 1.2))
    steps = 0
    while not pace.factors():
        pace.note({**dict.fromkeys(workers, 1.2), "a": 1.2 * factor})
        steps += 1

    assert steps == WINDOW_STEPS // 2 + 1
    assert pace.factors() == pytest.approx({"a": factor})
    pace.begin_plan()
    assert pace.factors() == {}


@pytest.mark.parametrize("speeds", [(1, 1), (1, 2, 1), (3, 1, 2, 1), (1, 1, 1, 1, 1)])
def test_device_ten_times_slower_the_new_plan_recovers_most_of_the_new_optimum(speeds):
    problem = problem_of(*speeds, num_blocks=4)
    plan = problem.plan()
    running = as_running(problem, plan)
    slow = plan.stages[-1].agent_ids[0]
    truth = corrected(running, {slow: 10.0})
    generator = random.Random(len(speeds))
    pace = Pace()
    pace.begin_plan()
    for step in range(4 * SETTLED):
        real = {agent: 10.0 if agent == slow and step >= 2 * SETTLED else 1.0 for agent in plan.agent_ids}
        pace.note({agent: 1.3 * ratio * generator.uniform(0.9, 1.1) for agent, ratio in real.items()})

    seen = corrected(running, pace.factors())
    new = seen.plan()

    assert step_s_of(truth, new) * 0.8 <= truth.plan().step_s
    assert step_s_of(truth, new) < step_s_of(truth, plan) / 1.5
    decision = decide_move(
        choice(step_s=step_s_of(seen, plan), new_step_s=new.step_s, move_s=5 * plan.step_s, steps_left=200)
    )
    assert isinstance(decision, Move)


@pytest.mark.parametrize("speeds", [(1,), (1, 2), (3, 1, 2, 1)])
def test_present_plan_is_priced_as_it_was_planned(speeds):
    problem = problem_of(*speeds)
    plan = problem.plan()

    assert step_s_of(as_running(problem, plan), plan) == pytest.approx(plan.step_s)


def test_planned_seconds_of_replicas_follow_their_shares():
    plan = problem_of(1, 3, num_blocks=4, shape=job(llama(4), micro_batch_rows=1, exact_stages=1)).plan()
    assert plan.has_replicas
    (owners,) = plan.micro_batch_owners

    found = planned_compute_s(plan)

    for index, replica in enumerate(plan.stages[0].replicas):
        assert found[0, index] == pytest.approx(owners.count(index) * (replica.forward_s + replica.backward_s))


def test_running_problem_keeps_micro_batch_and_codec():
    table = llama(4)
    shape = job(table, micro_batch_rows=2)
    free = problem_of(1, 1, num_blocks=4, shape=shape, is_micro_batch_free=True, codecs=("raw", "bf16"))
    plan = free.plan()

    running = as_running(free, plan)
    again = corrected(running, {plan.agent_ids[0]: 10.0}).plan()

    assert (again.micro_batch_rows, again.codec) == (plan.micro_batch_rows, plan.codec)
    assert again.num_micro_batches == plan.num_micro_batches


def test_running_problem_rounds_where_the_plan_does_wherever_it_cuts_next():
    table, slow = llama(4), LinkTable(other=LinkProfile(bandwidth_bytes_per_s=2e5))
    shape = job(table, micro_batch_rows=2, exact_stages=2)
    free = problem_of(1, 1, num_blocks=4, shape=shape, is_micro_batch_free=True, codecs=("raw", "bf16"))
    free = free.model_copy(update={"links": slow})
    plan = free.plan()
    assert plan.bf16_borders

    running = as_running(free, plan)
    again = corrected(running, {plan.agent_ids[0]: 10.0}).plan()

    assert running.shape.bf16_borders == plan.bf16_borders and running.shape.codec == "raw"
    assert step_s_of(running, plan) == pytest.approx(plan.step_s)
    assert set(again.bf16_borders) <= set(plan.bf16_borders)


def test_moves_and_their_reason_in_words():
    problem = problem_of(1, 1, 1, num_blocks=6, allow_replicas=False, shape=job(llama(6), exact_stages=2))
    present = plan_over(problem, 0, 1)
    new = plan_over(problem, 0, 2)
    here, there = present.stages[1], new.stages[1]
    assert (here.device_names, there.device_names) == (("d1",), ("d2",)) and here.start_block == there.start_block

    assert moves_in_words(present, new) == f"blocks {here.start_block}-5 from d1 to d2"
    assert moves_in_words(present, present) == "the same blocks with other shares of the micro-batches"
    assert (
        why_in_words({"id-d1": "d1"}, {"id-d1": 9.81}, ["d2"]) == "d1 takes 9.8 times as long as planned and d2 joined"
    )
