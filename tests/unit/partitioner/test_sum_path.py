from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partitioner.sum_path import BUSY_S_PER_BYTE, left_over_s, link_uses, runs, sum_factors, way_back

OWNERS = st.integers(1, 5).flatmap(
    lambda n: st.tuples(st.just(n), st.lists(st.integers(0, n - 1), min_size=1, max_size=9))
)


@given(OWNERS)
def test_sum_passes_micro_batches_in_order_and_the_total_reaches_everyone_once(numbers):
    num_replicas, owners = numbers

    stops = runs(owners)
    back = way_back([replica for replica, _ in stops], range(num_replicas))

    assert [m for _, micro_batches in stops for m in micro_batches] == list(range(len(owners)))
    assert all(owners[m] == replica for replica, micro_batches in stops for m in micro_batches)
    assert all(one[0] != after[0] for one, after in pairwise(stops))
    assert back[0] == owners[-1] and sorted(back) == list(range(num_replicas))


def test_neighbouring_micro_batches_cost_each_link_one_gradient_in_either_direction():
    assert link_uses((0, 0, 1, 1, 2), 3) == {(0, 1): 1, (1, 2): 1, (2, 1): 1, (1, 0): 1}


def test_replica_without_a_micro_batch_gets_the_total_last():
    assert way_back([0, 1], range(3)) == (1, 0, 2)


def test_sum_costs_what_its_busiest_link_carries_and_one_message_more_on_the_others():
    slow, quick = 2.0, 1.0
    seconds = [[0.0, quick, quick], [quick, 0.0, slow], [quick, slow, 0.0]]

    assert sum_factors((0, 1, 2), seconds) == (pytest.approx(slow), pytest.approx(quick + slow + quick))
    assert sum_factors((0, 1, 0, 1), [[0.0, quick], [quick, 0.0]])[0] == pytest.approx(2 * quick)
    assert sum_factors((0, 0), [[0.0]]) == (0.0, 0.0)


def test_step_waits_for_what_no_pass_hides_and_always_for_what_the_sum_computes():
    num_bytes = 10**6
    busy_s = BUSY_S_PER_BYTE * num_bytes

    assert left_over_s(1.0, 0.25, num_bytes) == 0.75
    assert left_over_s(1.0, 5.0, num_bytes) == busy_s
    assert left_over_s(0.0, 0.0, num_bytes) == busy_s
