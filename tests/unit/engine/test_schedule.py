from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_node.engine.schedule import (
    Backward,
    Forward,
    Receive,
    Send,
    forward_actions,
    forwards_ahead,
    train_actions,
)
from edge_node.transport.base import MessageKind, Peer
from plutino.job.assignment import StageShape

QUEUE_MESSAGES = 2
"""What every transport promises: so many messages of one kind may wait between two workers."""


def chain(
    *replicas: int, tables: tuple[tuple[int, ...], ...] | None = None, runs_ahead: bool = False
) -> list[StageShape]:
    return [
        StageShape(
            start_block=i,
            end_block=i + 1,
            num_replicas=r,
            micro_batch_owner=tables[i] if tables else (),
            ahead=len(replicas) - 1 - i if runs_ahead else 0,
        )
        for i, r in enumerate(replicas)
    ]


@st.composite
def pipelines(draw):
    """Stages with any table over their replicas, fair or not, and the number of micro-batches of a step."""
    replicas = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    tables = tuple(tuple(draw(st.lists(st.integers(0, r - 1), min_size=1, max_size=6))) for r in replicas)
    stages = chain(*replicas, tables=tables, runs_ahead=draw(st.booleans()))
    return stages, draw(st.integers(0, 12)), draw(st.integers(0, len(stages) - 1))


def workers_of(stages):
    return [Peer(i, r) for i, stage in enumerate(stages) for r in range(stage.num_replicas)]


def simulate(actions_of) -> dict[Peer, list]:
    """Carry out every worker's actions over bounded queues; what each did, complete only without a deadlock."""
    waiting: dict[tuple[Peer, Peer, MessageKind], set[int]] = {}
    done: dict[Peer, list] = {me: [] for me in actions_of}

    def can_run(me, action):
        match action:
            case Send(m, kind, peer):
                queue = waiting.setdefault((me, peer, kind), set())
                return len(queue) < QUEUE_MESSAGES and (queue.add(m) or True)
            case Receive(m, kind, peer):
                queue = waiting.get((peer, me, kind), set())
                return m in queue and (queue.remove(m) or True)
        return True

    moved = True
    while moved:
        moved = False
        for me, actions in actions_of.items():
            while len(done[me]) < len(actions) and can_run(me, actions[len(done[me])]):
                done[me].append(actions[len(done[me])])
                moved = True
    assert not any(waiting.values()), "messages that nobody received"
    return done


def step_actions(stages, num_micro_batches, first_trainable_stage=0):
    return {
        me: train_actions(
            stages, me=me, num_micro_batches=num_micro_batches, first_trainable_stage=first_trainable_stage
        )
        for me in workers_of(stages)
    }


def short(actions) -> str:
    """F0 B0 ... of the computing actions."""
    return " ".join(f"{type(a).__name__[0]}{a.micro_batch}" for a in actions if isinstance(a, Forward | Backward))


@settings(max_examples=60, deadline=None)
@given(pipelines())
def test_step_over_bounded_queues_never_deadlocks(pipeline):
    actions_of = step_actions(*pipeline)

    assert simulate(actions_of) == actions_of


@settings(max_examples=60, deadline=None)
@given(pipelines())
def test_evaluation_over_bounded_queues_never_deadlocks_and_runs_each_micro_batch_once(pipeline):
    stages, num_micro_batches, _ = pipeline
    actions_of = {me: forward_actions(stages, me=me, num_micro_batches=num_micro_batches) for me in workers_of(stages)}

    assert simulate(actions_of) == actions_of
    assert not any(isinstance(action, Backward) for actions in actions_of.values() for action in actions)


@settings(max_examples=60, deadline=None)
@given(pipelines())
def test_step_runs_each_micro_batch_once_per_stage_on_its_owner(pipeline):
    stages, num_micro_batches, first_trainable_stage = pipeline
    actions_of = step_actions(*pipeline)

    for index, stage in enumerate(stages):
        ran = Counter((type(a), a.micro_batch, me) for me in actions_of if me.stage_index == index
                      for a in actions_of[me] if isinstance(a, Forward | Backward))  # fmt: skip
        kinds = (Forward, Backward) if index >= first_trainable_stage else (Forward,)
        owner = {m: Peer(index, stage.replica_of(m)) for m in range(num_micro_batches)}
        assert ran == Counter((kind, m, owner[m]) for kind in kinds for m in range(num_micro_batches))


@settings(max_examples=60, deadline=None)
@given(pipelines())
def test_backward_passes_come_in_the_order_of_micro_batches_and_after_their_forward(pipeline):
    for actions in step_actions(*pipeline).values():
        backward = [action.micro_batch for action in actions if isinstance(action, Backward)]
        assert backward == sorted(backward)
        assert all(actions.index(Forward(m)) < actions.index(Backward(m)) for m in backward)


@settings(max_examples=60, deadline=None)
@given(pipelines())
def test_micro_batches_in_flight_stay_within_forwards_ahead(pipeline):
    stages, _, first_trainable_stage = pipeline
    for me, actions in step_actions(*pipeline).items():
        in_flight = most = 0
        for action in actions:
            in_flight += isinstance(action, Forward) - isinstance(action, Backward)
            most = max(most, in_flight)
        if me.stage_index >= first_trainable_stage:
            assert most <= forwards_ahead(stages, me.stage_index)


@settings(max_examples=60, deadline=None)
@given(pipelines())
def test_nothing_flows_back_below_the_first_trainable_stage(pipeline):
    stages, num_micro_batches, first_trainable_stage = pipeline
    actions_of = step_actions(*pipeline)

    sends = Counter(me.stage_index for me, actions in actions_of.items() for a in actions
                    if isinstance(a, Send) and a.kind is MessageKind.BACKWARD)  # fmt: skip

    assert sends == Counter(dict.fromkeys(range(first_trainable_stage + 1, len(stages)), num_micro_batches)) + Counter()


def test_three_stages_of_one_replica_run_1f1b():
    actions_of = step_actions(chain(1, 1, 1), 5)

    assert [short(actions) for actions in actions_of.values()] == [
        "F0 F1 F2 B0 F3 B1 F4 B2 B3 B4",
        "F0 F1 B0 F2 B1 F3 B2 F4 B3 B4",
        "F0 B0 F1 B1 F2 B2 F3 B3 F4 B4",
    ]


def test_stages_that_run_ahead_have_a_micro_batch_to_run_while_a_message_is_on_its_way():
    actions_of = step_actions(chain(1, 1, 1, runs_ahead=True), 6)

    assert [short(actions) for actions in actions_of.values()] == [
        "F0 F1 F2 F3 F4 B0 F5 B1 B2 B3 B4 B5",
        "F0 F1 F2 B0 F3 B1 F4 B2 F5 B3 B4 B5",
        "F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5",
    ]


def test_middle_stage_receives_before_and_sends_after_each_pass():
    forward, backward = MessageKind.FORWARD, MessageKind.BACKWARD
    before, after = Peer(0), Peer(2)

    assert train_actions(chain(1, 1, 1), me=Peer(1), num_micro_batches=1) == [
        Receive(0, forward, before), Forward(0), Send(0, forward, after),
        Receive(0, backward, after), Backward(0), Send(0, backward, before),
    ]  # fmt: skip


def test_step_shorter_than_the_pipeline_runs_all_forwards_first():
    actions_of = step_actions(chain(1, 1, 1, 1), 2)

    assert [short(actions) for actions in actions_of.values()] == ["F0 F1 B0 B1"] * 3 + ["F0 B0 F1 B1"]


def test_unfair_table_between_single_stages_does_not_deadlock():
    """One replica's micro-batches far apart: it must not wait for the later one before it runs the first backward."""
    stages = chain(1, 2, 1, tables=((0,), (0, 0, 0, 1), (0,)))
    actions_of = step_actions(stages, 12)

    assert simulate(actions_of) == actions_of
    assert short(actions_of[Peer(1, 1)]) == "F3 B3 F7 B7 F11 B11"


@pytest.mark.parametrize(
    ("replicas", "expected"), [((1, 1, 1), [3, 2, 1]), ((2, 3), [3, 1]), ((1, 2, 1), [4, 2, 1]), ((3,), [1])]
)
def test_forwards_ahead_gives_every_later_replica_one(replicas, expected):
    stages = chain(*replicas, tables=tuple(tuple(range(r)) for r in replicas))

    assert [forwards_ahead(stages, index) for index in range(len(stages))] == expected


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=7), st.integers(0, 40))
def test_replica_of_wraps_around_its_table(table, micro_batch):
    (stage,) = chain(3, tables=(tuple(table),))

    assert stage.replica_of(micro_batch) == table[micro_batch % len(table)]
    assert chain(3)[0].replica_of(micro_batch) == 0
