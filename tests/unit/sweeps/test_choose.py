"""Which trials go on and which one is taken, on values."""

from __future__ import annotations

import pytest

from coordinator.sweeps.choose import Rung, plan_rungs, ranked, recommend
from plutino.sweep import Halving, TrialResult


def result(trial, score=None, *, params=100, loss=None, state="succeeded", rows=400):
    return TrialResult(
        trial=trial, settings={}, state=state, score=score, num_scored=rows, eval_loss=loss, trained_params=params
    )


def test_without_halving_every_trial_runs_in_full():
    assert plan_rungs(12, 90, None) == (Rung(12, None),)


def test_halving_gives_a_third_of_the_trials_three_times_the_steps_and_ends_with_all():
    assert plan_rungs(12, 90, Halving(eta=3, min_steps=5)) == (Rung(12, 10), Rung(4, 30), Rung(1, None))


def test_halving_begins_with_no_fewer_than_the_fewest_steps():
    assert plan_rungs(12, 90, Halving(eta=3, min_steps=30)) == (Rung(12, 30), Rung(4, None))
    assert plan_rungs(12, 90, Halving(eta=3, min_steps=91)) == (Rung(12, None),)


def test_of_scores_within_the_standard_error_the_trial_that_trains_least_is_recommended():
    # sqrt(0.8 * 0.2 / 400) = 0.02
    found = recommend([result(0, 0.80, params=1000), result(1, 0.785, params=10), result(2, 0.77, params=1)])
    assert found.trial == 1
    assert "78.5%" in found.reason and "80.0%" in found.reason and "2.0%" in found.reason and "10 param" in found.reason


def test_a_score_that_is_better_by_more_than_its_error_wins_whatever_it_trains():
    found = recommend([result(0, 0.80, params=1000), result(1, 0.77, params=10)])
    assert found.trial == 0 and "by more than" in found.reason and "77.0%" in found.reason


def test_best_that_is_also_the_smallest_of_its_equals_says_so():
    found = recommend([result(0, 0.80, params=10), result(1, 0.79, params=1000)])
    assert found.trial == 0 and "fewest" in found.reason and "2 trials" in found.reason


def test_without_scores_the_lowest_loss_wins():
    found = recommend([result(0, loss=1.2), result(1, loss=0.9, params=10**6), result(2, loss=1.0)])
    assert found.trial == 1 and "0.9000" in found.reason and "1.0000" in found.reason


def test_of_trials_without_a_right_row_the_lowest_loss_goes_on_and_wins_whatever_they_train():
    results = [result(0, 0.0, loss=8.0, params=10), result(1, 0.0, loss=3.0, params=1000), result(2, 0.0, loss=5.0)]
    assert [one.trial for one in ranked(results)] == [1, 2, 0]
    found = recommend(results)
    assert found.trial == 1 and "no trial has a row right" in found.reason and "3.0000" in found.reason


def test_trials_that_failed_or_were_not_measured_are_never_chosen():
    assert recommend([result(0, 0.9, state="failed"), result(1)]) is None
    assert [one.trial for one in ranked([result(0, 0.9, state="failed"), result(2, 0.1), result(1, 0.1)])] == [1, 2]


@pytest.mark.parametrize("num_trials", [1, 2, 3, 13, 100])
def test_rungs_never_grow_and_end_with_full_jobs(num_trials):
    rungs = plan_rungs(num_trials, 1000, Halving(eta=2, min_steps=1))
    counts = [rung.num_trials for rung in rungs]
    assert counts == sorted(counts, reverse=True) and counts[0] == num_trials and rungs[-1].steps is None
    assert all(rung.steps is not None for rung in rungs[:-1])
