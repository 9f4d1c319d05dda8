from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_node.engine.neighbours import partners
from edge_node.engine.schedule import Receive, Send, forward_actions, train_actions
from edge_node.engine.shared_gradients import MAX_GROUP_BYTES, plan_groups
from edge_node.methods.base import TrainableParameter
from edge_node.transport.base import Peer
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
@given(PIPELINES, st.integers(1, 9))
def test_partners_are_mutual_and_hold_everybody_a_worker_ever_talks_with(numbers, num_micro_batches):
    stages = [
        StageShape(start_block=k, end_block=k + 1, num_replicas=n, micro_batch_owner=tuple(table))
        for k, (n, table) in enumerate(numbers)
    ]
    workers = [Peer(k, r) for k, stage in enumerate(stages) for r in range(stage.num_replicas)]
    groups = {me: plan_groups(parameters_of(me.stage_index, len(stages)), stages, me)[0] for me in workers}
    of = {me: partners(stages, groups[me], me) for me in workers}

    for me in workers:
        assert me not in of[me]
        assert all(me in of[other] for other in of[me])
        actions = [
            *train_actions(stages, me=me, num_micro_batches=num_micro_batches),
            *forward_actions(stages, me=me, num_micro_batches=num_micro_batches),
        ]
        assert {action.peer for action in actions if isinstance(action, Send | Receive)} <= of[me]
        for group in groups[me]:
            assert set(group.holders) - {me} <= of[me] if me == group.holders[0] else group.holders[0] in of[me]
        if me.replica_index == 0:
            generating = {Peer(k) for k in (me.stage_index - 1, me.stage_index + 1) if 0 <= k < len(stages)}
            assert generating <= of[me]
    assert len(stages) == 1 or Peer(len(stages) - 1) in of[Peer(0)]


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
