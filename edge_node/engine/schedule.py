"""Which worker does what, in which order: 1F1B as a pure list of actions per worker.

1F1B (Narayanan et al. 2019, PipeDream; 2021, arXiv:2104.04473 sec. 2.2): a stage runs a few forward passes ahead, then
alternates one forward with one backward, so that at most as many micro-batches are in flight as stages lie below it.
Every stage may have several replicas; the table micro-batch -> replica says which of them runs a micro-batch.

Backward passes of a worker come in the order of micro-batches whatever the number of stages, which is why its
gradients add up to the same bits in every partition.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from edge_node.transport.base import MessageKind, Peer
from plutino.job.assignment import StageShape


@dataclass(frozen=True, slots=True)
class Forward:
    """Run the stage on a micro-batch; on the last stage, the loss too."""

    micro_batch: int


@dataclass(frozen=True, slots=True)
class Backward:
    """Run the backward pass of a micro-batch."""

    micro_batch: int


@dataclass(frozen=True, slots=True)
class Send:
    """Hand a micro-batch's tensors to a peer."""

    micro_batch: int
    kind: MessageKind
    peer: Peer


@dataclass(frozen=True, slots=True)
class Receive:
    """Wait for a micro-batch's tensors from a peer."""

    micro_batch: int
    kind: MessageKind
    peer: Peer


Action = Forward | Backward | Send | Receive


def forward_window(stages: Sequence[StageShape], stage_index: int) -> int:
    """How far a stage's forward passes run ahead of its backward passes, in micro-batches of the step.

    As far as 1F1B needs to keep all busy, and further by :attr:`StageShape.ahead`: with one more for each boundary a
    message has the time of a whole micro-batch for its way before anybody waits for it.

    Every replica of this and of all later stages must have a micro-batch to work on; with one replica everywhere this
    is the number of stages from this one on. Micro-batch m is run backward only after every micro-batch of the same
    worker below m + window was run forward. The window shrinks from stage to stage, so what a stage needs forward for
    m is held up, one stage below, by backward passes of micro-batches below m alone: whatever the tables, no workers
    ever wait for each other in a circle.
    """
    return sum(stage.num_replicas for stage in stages[stage_index:]) + stages[stage_index].ahead


def forwards_ahead(stages: Sequence[StageShape], stage_index: int) -> int:
    """Micro-batches that one replica of a stage holds at once, at most: its largest share of any window."""
    shape = stages[stage_index]
    period = max(1, len(shape.micro_batch_owner))
    window = forward_window(stages, stage_index)
    owners = [shape.replica_of(m) for m in range(period + window)]
    return max(
        owners[first : first + window].count(replica)
        for first in range(period)
        for replica in range(shape.num_replicas)
    )


def train_actions(
    stages: Sequence[StageShape],
    *,
    me: Peer,
    num_micro_batches: int,
    first_trainable_stage: int = 0,
) -> list[Action]:
    """The actions of one worker for one optimiser step.

    Args:
        stages: all stages of the plan.
        me: the worker.
        num_micro_batches: micro-batches of this step.
        first_trainable_stage: the lowest stage that trains anything; stages below it only run forward.
    """
    mine = [m for m in range(num_micro_batches) if stages[me.stage_index].replica_of(m) == me.replica_index]
    if me.stage_index < first_trainable_stage:
        return [action for m in mine for action in _forward(stages, me, m)]
    window = forward_window(stages, me.stage_index)
    sends_gradient = me.stage_index > first_trainable_stage
    actions: list[Action] = []
    to_forward = deque(mine)
    for m in mine:
        while to_forward and to_forward[0] < m + window:
            actions += _forward(stages, me, to_forward.popleft())
        actions += _backward(stages, me, m, sends_gradient=sends_gradient)
    return actions


def forward_actions(
    stages: Sequence[StageShape], *, me: Peer, num_micro_batches: int, kind: MessageKind = MessageKind.FORWARD
) -> list[Action]:
    """The actions of one worker for an evaluation, or for a reference: forward passes only."""
    mine = [m for m in range(num_micro_batches) if stages[me.stage_index].replica_of(m) == me.replica_index]
    return [action for m in mine for action in _forward(stages, me, m, kind)]


def first_gradient_actions(
    stages: Sequence[StageShape], *, me: Peer, num_micro_batches: int, first_trainable_stage: int
) -> list[Action]:
    """The actions of one worker for gradients of frozen blocks: one micro-batch after the other."""
    mine = [m for m in range(num_micro_batches) if stages[me.stage_index].replica_of(m) == me.replica_index]
    actions: list[Action] = []
    for m in mine:
        actions += _forward(stages, me, m, MessageKind.FIRST_FORWARD)
        if me.stage_index >= first_trainable_stage:
            sends_gradient = me.stage_index > first_trainable_stage
            actions += _backward(stages, me, m, sends_gradient=sends_gradient, kind=MessageKind.FIRST_BACKWARD)
    return actions


def _forward(stages: Sequence[StageShape], me: Peer, m: int, kind: MessageKind = MessageKind.FORWARD) -> list[Action]:
    actions: list[Action] = []
    if me.stage_index > 0:
        actions.append(Receive(m, kind, neighbour(stages, me, m, -1)))
    actions.append(Forward(m))
    if me.stage_index < len(stages) - 1:
        actions.append(Send(m, kind, neighbour(stages, me, m, +1)))
    return actions


def _backward(
    stages: Sequence[StageShape],
    me: Peer,
    m: int,
    *,
    sends_gradient: bool,
    kind: MessageKind = MessageKind.BACKWARD,
) -> list[Action]:
    actions: list[Action] = []
    if me.stage_index < len(stages) - 1:
        actions.append(Receive(m, kind, neighbour(stages, me, m, +1)))
    actions.append(Backward(m))
    if sends_gradient:
        actions.append(Send(m, kind, neighbour(stages, me, m, -1)))
    return actions


def neighbour(stages: Sequence[StageShape], me: Peer, m: int, direction: int) -> Peer:
    """The worker of the next (+1) or previous (-1) stage that runs a micro-batch."""
    stage_index = me.stage_index + direction
    return Peer(stage_index, stages[stage_index].replica_of(m))
