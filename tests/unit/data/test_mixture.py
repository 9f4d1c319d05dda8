from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plutino.data.batches import steps_per_epoch
from plutino.data.mixture import Mixture, make_mixture, mixture_indices


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=2, max_size=5),
    weight=st.floats(0.01, 100),
    temperature=st.floats(0.5, 50),
)
def test_shares_fill_an_epoch_exactly_and_leave_no_task_out(
    sizes: list[int], weight: float, temperature: float
) -> None:
    mixture = make_mixture(sizes, [weight] + [1.0] * (len(sizes) - 1), temperature)

    assert sum(mixture.rows_per_epoch) == mixture.num_samples == sum(sizes)
    assert min(mixture.rows_per_epoch) >= 1


@pytest.mark.parametrize(
    ("temperature", "weights", "shares"),
    [
        (1.0, (1.0, 1.0), (90, 10)),  # by rows
        (1.0, (1.0, 9.0), (50, 50)),
        (2.0, (1.0, 1.0), (75, 25)),  # roots: 3 to 1
        (1e9, (1.0, 1.0), (50, 50)),  # all alike
    ],
)
def test_shares_are_t5s_rates_times_weights(
    temperature: float, weights: tuple[float, ...], shares: tuple[int, ...]
) -> None:
    assert make_mixture([90, 10], weights, temperature).rows_per_epoch == shares


def positions(mixture: Mixture, batch_size: int, epochs: int) -> list[int]:
    num_steps = epochs * steps_per_epoch(mixture.num_samples, batch_size)
    return [index for step in range(num_steps) for index in mixture_indices(step, batch_size, mixture, seed=3)]


def test_a_task_repeats_a_row_only_after_all_its_others_and_goes_on_over_epochs() -> None:
    mixture = make_mixture([20, 4], [1.0, 5.0], 1.0)
    assert mixture.rows_per_epoch == (12, 12)

    seen = positions(mixture, 5, epochs=5)

    small = [index - 20 for index in seen if index >= 20]
    large = [index for index in seen if index < 20]
    assert len(small) == len(large) == 60
    for task, size in ((small, 4), (large, 20)):
        for first in range(0, 60, size):
            assert sorted(task[first : first + size]) == list(range(size))


def test_any_step_is_known_without_the_steps_before_it() -> None:
    mixture = make_mixture([7, 5, 3], [1.0, 1.0, 2.0], 2.0)
    in_order = [mixture_indices(step, 4, mixture, seed=1) for step in range(12)]

    assert [mixture_indices(step, 4, mixture, seed=1) for step in reversed(range(12))] == in_order[::-1]
    assert in_order != [mixture_indices(step, 4, mixture, seed=2) for step in range(12)]


def test_tasks_take_turns_within_an_epoch() -> None:
    mixture = make_mixture([50, 50], [1.0, 1.0], 1.0)

    tasks = [index // 50 for index in positions(mixture, 10, epochs=1)]

    assert Counter(tasks) == {0: 50, 1: 50}
    assert 20 < sum(left != right for left, right in itertools.pairwise(tasks)) < 80
