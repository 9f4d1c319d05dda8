from __future__ import annotations

from coordinator.jobs.near_end import AHEAD_S, NearEnd


def reached_at(asked_s: dict[int, float], last_step: int) -> list[int]:
    """The steps at which the end is near, of steps asked for at given seconds."""
    times_s = iter(asked_s.values())
    near = NearEnd(last_step, lambda: next(times_s))
    return [step for step in asked_s if near.is_reached(step)]


def test_end_is_near_from_the_step_on_after_which_the_others_take_few_seconds() -> None:
    pace_s = AHEAD_S / 4

    assert reached_at({step: step * pace_s for step in range(20)}, 19) == [15, 16, 17, 18, 19]


def test_end_of_a_quick_epoch_after_a_slow_one_is_told_by_the_quick_ones_pace() -> None:
    slow = {step: step * AHEAD_S for step in range(10)}
    quick = {10 + step: 10 * AHEAD_S + step * AHEAD_S / 100 for step in range(10)}

    assert min(reached_at(slow | quick, 29)) == 16, "with the sixth question since"


def test_end_of_a_job_of_one_step_is_reached_with_it() -> None:
    assert reached_at({0: 0.0}, 0) == [0]


def test_end_is_not_near_for_a_job_that_goes_back_to_an_earlier_step() -> None:
    assert reached_at({8: 0.0, 3: 1.0}, 9) == []
