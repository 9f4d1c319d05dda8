from __future__ import annotations

from collections import Counter
from itertools import pairwise

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edge_node.engine.neighbours import partners
from edge_node.engine.schedule import Receive, Send, forward_actions, train_actions
from edge_node.engine.shared_gradients import MAX_GROUP_BYTES, Group, hops_of, plan_groups, sum_partners
from edge_node.engine.sum_turns import turns_of
from edge_node.methods.base import TrainableParameter
from edge_node.transport.base import Peer
from edge_node.transport.in_process import QUEUE_MESSAGES
from partitioner.shared_sums import uses_over
from partitioner.sum_path import runs, way_back
from plutino.job.assignment import StageShape

# A pipeline as replicas of every stage with their tables, all of one length.
PIPELINES = st.integers(1, 6).flatmap(
    lambda length: st.lists(
        st.integers(1, 3).flatmap(
            lambda n: st.tuples(st.just(n), st.lists(st.integers(0, n - 1), min_size=length, max_size=length))
        ),
        min_size=1,
        max_size=4,
    )
)


def parameter(name: str, role: str, all_roles: tuple[str, ...], size: int = 2) -> TrainableParameter:
    return TrainableParameter(name, ((role, torch.nn.Parameter(torch.zeros(size))),), all_roles)


def parameters_of(stage_index: int, num_stages: int) -> list[TrainableParameter]:
    """One of every block, and an embedding that is the head too."""
    found = [parameter(f"block{stage_index}", "block", ("block",))]
    if stage_index in (0, num_stages - 1):
        role = "embedding" if stage_index == 0 else "head"
        found.append(parameter("embedding", role, ("embedding", "head")))
    return found


@settings(max_examples=80, deadline=None)
@given(PIPELINES, st.integers(1, 9), st.booleans())
def test_partners_are_mutual_and_hold_everybody_a_worker_ever_talks_with(numbers, num_micro_batches, are_folded):
    stages = [
        StageShape(start_block=k, end_block=k + 1, num_replicas=n, micro_batch_owner=tuple(table))
        for k, (n, table) in enumerate(numbers)
    ]
    workers = [Peer(k, r) for k, stage in enumerate(stages) for r in range(stage.num_replicas)]
    groups = {me: plan_groups(parameters_of(me.stage_index, len(stages)), stages, me)[0] for me in workers}
    sums = {me: sum_partners(groups[me], stages, me, are_folded=are_folded) for me in workers}
    of = {me: partners(stages, sums[me], me) for me in workers}

    for me in workers:
        assert me not in of[me]
        assert all(me in of[other] for other in of[me])
        actions = [
            *train_actions(stages, me=me, num_micro_batches=num_micro_batches),
            *forward_actions(stages, me=me, num_micro_batches=num_micro_batches),
        ]
        assert {action.peer for action in actions if isinstance(action, Send | Receive)} <= of[me]
        for group in groups[me]:
            hops = hops_of(group, stages, num_micro_batches, are_folded=are_folded)
            back = way_back([hop.owner for hop in hops], group.holders)
            assert sorted(back, key=repr) == sorted(group.holders, key=repr)
            for here, there in (*_sent(hops), *pairwise(back)):
                assert me not in (here, there) or {here, there} - {me} <= of[me]
        if me.replica_index == 0:
            generating = {Peer(k) for k in (me.stage_index - 1, me.stage_index + 1) if 0 <= k < len(stages)}
            assert generating <= of[me]
    assert len(stages) == 1 or Peer(len(stages) - 1) in of[Peer(0)]


@settings(max_examples=40, deadline=None)
@given(PIPELINES)
def test_planner_counts_what_workers_send_of_a_parameter_that_two_stages_hold(numbers):
    length, last = len(numbers[0][1]), len(numbers) - 1
    stages = [
        StageShape(start_block=k, end_block=k + 1, num_replicas=n, micro_batch_owner=tuple(table))
        for k, (n, table) in enumerate(numbers)
    ]
    held_by = dict.fromkeys((0, last))
    holders = tuple(Peer(k, r) for k in held_by for r in range(numbers[k][0]))
    group = Group(holders, ("embedding",), ("embedding", "head"))
    hops = hops_of(group, stages, length, are_folded=False)
    sent = Counter([*_sent(hops), *pairwise(way_back([hop.owner for hop in hops], holders))])

    stops = [[Peer(k, replica) for replica, _ in runs(numbers[k][1])] for k in (0, last)]

    assert uses_over(stops, holders) == sent


def _sent(hops):
    """Who sends a sum to whom."""
    ends = [hop for hop in hops if hop.ends_role]
    pairs = [(one, after) for one, after in pairwise(hops) if not one.ends_role] + list(pairwise(ends))
    return [(one.owner, after.owner) for one, after in pairs if one.owner != after.owner]


@settings(max_examples=60, deadline=None)
@given(PIPELINES, st.integers(1, 9), st.integers(1, 30), st.sampled_from(["all", "first", "last"]))
@example(numbers=[(2, [0, 1])], num_micro_batches=5, num_groups=9, turn="all")
def test_sums_that_follow_one_another_never_wait_for_each_other_in_a_circle(
    numbers, num_micro_batches, num_groups, turn
):
    """Every worker takes its turns in order; a message may be sent only while its receiver has fewer than two.

    That is what a hub within a process lets wait; a link lets four. Of those who can go on all do, or one does until it
    cannot.
    """
    stages = [
        StageShape(start_block=k, end_block=k + 1, num_replicas=n, micro_batch_owner=tuple(table))
        for k, (n, table) in enumerate(numbers)
    ]
    first = Peer(0)
    for group in plan_groups(parameters_of(0, len(stages)), stages, first)[0]:
        hops = hops_of(group, stages, num_micro_batches, are_folded=False)
        back = way_back([hop.owner for hop in hops], group.holders)
        left = {me: turns_of(hops, back, num_groups, me) for me in group.holders}
        waiting: Counter[tuple[Peer, Peer]] = Counter()
        arrived: set[object] = set()
        while any(left.values()):
            ready = [
                me for me, turns in left.items() if turns and _may_take(turns[0], me, hops, back, arrived, waiting)
            ]
            assert ready, f"everyone waits: {left}"
            for me in {"all": ready, "first": ready[:1], "last": ready[-1:]}[turn]:
                _take(left[me].pop(0), me, hops, back, arrived, waiting)


def _gets(turn, me, hops, back):
    """(message, sender) pairs that a turn takes."""
    place, ends = turn.place, [h for h, hop in enumerate(hops) if hop.ends_role]
    if turn.kind == 2:
        return [(("total", turn.group, place), back[place - 1])] if place else []
    if turn.kind == 1:
        return []
    found = [] if place == 0 or hops[place - 1].ends_role else [(("sum", turn.group, place - 1), hops[place - 1].owner)]
    before = [end for end in ends if end < place]
    if hops[place].ends_role and before:
        found.append((("sum", turn.group, before[-1]), hops[before[-1]].owner))
    return [(message, sender) for message, sender in found if sender != me]


def _gives(turn, me, hops, back):
    """(message, receiver) pairs that a turn sends."""
    place, ends = turn.place, [h for h, hop in enumerate(hops) if hop.ends_role]
    if turn.kind == 2:
        return [(("total", turn.group, place + 1), back[place + 1])] if place + 1 < len(back) else []
    if turn.kind == 1:
        receiver = hops[next(end for end in ends if end > place)].owner
    elif hops[place].ends_role:
        return []
    else:
        receiver = hops[place + 1].owner
    return [(("sum", turn.group, place), receiver)] if receiver != me else []


def _may_take(turn, me, hops, back, arrived, waiting):
    return all(message in arrived for message, _ in _gets(turn, me, hops, back)) and all(
        waiting[me, receiver] < QUEUE_MESSAGES for _, receiver in _gives(turn, me, hops, back)
    )


def _take(turn, me, hops, back, arrived, waiting):
    for message, sender in _gets(turn, me, hops, back):
        arrived.remove(message)
        waiting[sender, me] -= 1
    for message, receiver in _gives(turn, me, hops, back):
        arrived.add(message)
        waiting[me, receiver] += 1


def test_partners_of_replicas_that_share_no_micro_batch_are_not_linked():
    stages = [StageShape(start_block=k, end_block=k + 1, num_replicas=2, micro_batch_owner=(0, 1)) for k in range(2)]

    assert Peer(1, 0) not in partners(stages, (), Peer(0, 1))
    assert partners(stages, (), Peer(0, 1)) == {Peer(1, 1)}


def test_groups_of_large_parameters_go_in_several_messages():
    stages = [StageShape(start_block=0, end_block=1, num_replicas=2, micro_batch_owner=(0, 1))]
    large = [parameter(name, "block", ("block",), MAX_GROUP_BYTES // 4 // 2) for name in "abcde"]

    groups, names = plan_groups(large, stages, Peer(0))

    assert [group.names for group in groups] == [("a", "b"), ("c", "d"), ("e",)]
    assert len({group.key for group in groups}) == 3 and names == set("abcde")
