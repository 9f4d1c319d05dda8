from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_node.engine.schedule import Backward, Forward, train_actions
from edge_node.transport.base import Peer
from partitioner.bounds import Bounds
from partitioner.cost import StageCost
from partitioner.device import LinkProfile, LinkTable
from partitioner.fitting import assign
from partitioner.layout import most_in_flight, owners_of, windows
from partitioner.orders import all_layouts
from partitioner.pricing import Pricer
from partitioner.replay import StageGroup, evaluation_order, replay
from plutino.job.assignment import StageShape
from plutino.job.method import LoraConfig
from tests.unit.partitioner.fleet import device, job, llama

TABLES = st.integers(1, 9).flatmap(
    lambda m: st.lists(st.integers(1, 3), min_size=1, max_size=4).flatmap(
        lambda sizes: st.tuples(
            st.just(m),
            st.tuples(*(st.lists(st.integers(0, n - 1), min_size=m, max_size=m).map(tuple) for n in sizes)),
            st.just(sizes),
        )
    )
)


@settings(max_examples=60, deadline=None)
@given(TABLES, st.integers(0, 3), st.booleans())
def test_evaluation_order_of_one_worker_is_what_the_executor_runs(table, num_frozen, runs_ahead):
    num_micro_batches, owners, sizes = table
    stages = [
        StageShape(
            start_block=k,
            end_block=k + 1,
            num_replicas=n,
            micro_batch_owner=owners[k],
            ahead=len(sizes) - 1 - k if runs_ahead else 0,
        )
        for k, n in enumerate(sizes)
    ]
    first_trainable = min(num_frozen, len(sizes) - 1)
    ahead = windows(tuple(tuple(range(n)) for n in sizes), runs_ahead=runs_ahead)
    order = evaluation_order(ahead, num_micro_batches, tuple(k >= first_trainable for k in range(len(sizes))))

    for k, n in enumerate(sizes):
        for replica in range(n):
            actions = train_actions(
                stages,
                me=Peer(k, replica),
                num_micro_batches=num_micro_batches,
                first_trainable_stage=first_trainable,
            )
            wanted = [(isinstance(a, Forward), a.micro_batch) for a in actions if isinstance(a, Forward | Backward)]
            assert [(fwd, m) for stage, fwd, m in order if stage == k and owners[k][m] == replica] == wanted
            held = most = 0
            for is_forward, _ in wanted:
                held += 1 if is_forward else -1
                most = max(most, held)
            if k >= first_trainable:
                assert most <= most_in_flight(owners[k], replica, ahead[k])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=3), st.integers(1, 7))
def test_owners_no_other_table_ends_earlier(seconds, num_micro_batches):
    def end_s(owners):
        return max(owners.count(r) * cost for r, cost in enumerate(seconds))

    every = product(range(len(seconds)), repeat=num_micro_batches)

    assert end_s(owners_of(seconds, num_micro_batches)) == pytest.approx(min(map(end_s, every)))


FLEETS = st.lists(st.tuples(st.sampled_from([0.2, 1.0, 3.0]), st.integers(330, 420)), min_size=1, max_size=3)


@settings(max_examples=40, deadline=None)
@given(
    FLEETS,
    st.integers(2, 5),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([2e5, 5e6, 1e9]),
    st.sampled_from([None, (2,), (0, 3)]),
    st.booleans(),
    st.data(),
)
def test_bound_never_exceeds_the_replay_of_any_cuts(numbers, num_blocks, rows, bandwidth, adapted, runs_ahead, data):
    table = llama(max(num_blocks, 4))
    shape = job(table, LoraConfig(blocks=adapted), micro_batch_rows=rows, runs_ahead=runs_ahead)
    devices = [device(f"d{i}", speed=s, available_mib=a) for i, (s, a) in enumerate(numbers)]
    links = LinkTable(other=LinkProfile(bandwidth_bytes_per_s=bandwidth, latency_s=1e-3))
    pricer = Pricer(table, shape, devices, links)
    layouts = all_layouts(devices, links, max_stages=min(len(devices), table.num_blocks), allow_replicas=True)
    layout = data.draw(st.sampled_from(layouts))
    inner = data.draw(st.permutations(range(1, table.num_blocks)))[: len(layout) - 1]
    cuts = (0, *sorted(inner), table.num_blocks)
    candidate = pricer.candidate(layout, cuts)

    bound_s = Bounds(pricer).step_bound_s(layout)

    if candidate is not None:
        assert bound_s <= candidate.step_s * (1 + 1e-9)
        assert pricer.step_seconds(layout, [cuts])[0] == pytest.approx(candidate.step_s)
        assert pricer.least_starts(layout) is not None


def test_stages_that_run_ahead_do_not_wait_for_messages_shorter_than_half_a_micro_batch():
    num_micro_batches, message_s = 8, 1.0
    links = (((message_s, 0.0),),)
    waiting, ahead, free = (
        replay(
            [StageGroup((StageCost(1.0, 2.0),), links=way, ahead=further), StageGroup((StageCost(1.0, 2.0),))],
            num_micro_batches,
        ).step_s
        for further, way in ((0, links), (1, links), (0, (((0.0, 0.0),),)))
    )

    assert free == 3.0 * (num_micro_batches + 1)
    assert ahead == free + 2 * message_s
    assert waiting == free + num_micro_batches * message_s


def test_replay_replicas_share_the_micro_batches_and_add_up_at_the_end():
    one = replay([StageGroup((StageCost(1.0, 2.0),), (0,) * 8)], 8)
    two = replay([StageGroup((StageCost(1.0, 2.0),) * 2, (0, 1) * 4, sum_s=0.5)], 8)

    assert (one.step_s, two.step_s) == (24.0, 12.5)


def test_assign_is_the_best_of_all_assignments():
    generator = np.random.default_rng(0)
    for _ in range(50):
        num_columns = int(generator.integers(1, 5))
        values = generator.integers(-5, 20, size=(int(generator.integers(num_columns, 6)), num_columns)).astype(float)
        best = max(
            sum(values[row, c] for c, row in enumerate(rows)) for rows in permutations(range(len(values)), num_columns)
        )

        rows = assign(values)

        assert len(set(rows)) == num_columns
        assert sum(values[row, c] for c, row in enumerate(rows)) == best
