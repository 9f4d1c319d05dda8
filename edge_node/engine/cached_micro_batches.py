"""Before a step that may find hidden states in the activation cache: the stages agree on who runs its blocks.

The first stage alone knows the rows; their keys go up, one message a micro-batch. Then every stage, from the last one
down, tells the one below whether it needs hidden states: it does if something above does, or if it lacks the states of
one of the rows itself. A stage checks every checksum before it answers, so that nothing has to be asked for again in
the middle of a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from edge_node.activation_cache.stage_cache import StageCache, row_keys
from edge_node.engine.schedule import neighbour
from edge_node.transport.base import MessageKey, MessageKind

if TYPE_CHECKING:
    from edge_node.engine.seat import Seat
    from edge_node.engine.unit import UnitInput


@dataclass(frozen=True, slots=True)
class CachedMicroBatch:
    """One micro-batch on one stage."""

    keys: Tensor
    """uint8 [B, 16], names of its rows."""
    runs_blocks: bool
    """Whether the stage's blocks run: their output is needed above, or their states are not all here."""


def agree_on_cached(
    seat: Seat, work: UnitInput, cache: StageCache, known: Mapping[int, CachedMicroBatch] | None = None
) -> dict[int, CachedMicroBatch]:
    """What is cached of the micro-batches that this worker runs.

    Args:
        seat: the worker's.
        work: the step.
        cache: of its stage.
        known: what a worker with the whole model found out before; it has nobody to agree with.

    Raises:
        PeerLostError: a peer went away.
        UnitCancelledError: the coordinator abandoned the step.
    """
    stages, me, stage = seat.stages, seat.me, seat.stage
    agreed: dict[int, CachedMicroBatch] = dict(known or {})
    mine = [m for m in range(work.num_micro_batches) if stages[me.stage_index].replica_of(m) == me.replica_index]
    mine = [m for m in mine if m not in agreed]
    keys: dict[int, Tensor] = {}
    for m in mine:
        key = MessageKey(MessageKind.CACHE_KEYS, work.unit, m)
        if stage.is_first:
            rows = work.rows[m]
            assert rows is not None, "the first stage reads tokens"
            keys[m] = row_keys(rows, cache.codec, has_targets=stage.family.halves is not None)
        else:
            # Received tensors live in a buffer that is lent again.
            keys[m] = seat.transport.receive(neighbour(stages, me, m, -1), key)["keys"].clone()
        if not stage.is_last:
            seat.transport.send(neighbour(stages, me, m, +1), key, {"keys": keys[m]})
    for m in mine:
        key = MessageKey(MessageKind.CACHE_NEEDS, work.unit, m)
        is_needed_above = False
        if not stage.is_last:
            answer = seat.transport.receive(neighbour(stages, me, m, +1), key)
            is_needed_above = bool(answer["is_needed"][0])
        # Without blocks there is nothing to agree on: what is read is checked then.
        runs_blocks = stage.has_backbone and (not cache.holds(keys[m]) or is_needed_above)
        if not stage.is_first:
            answer = {"is_needed": torch.tensor([runs_blocks], dtype=torch.uint8)}
            seat.transport.send(neighbour(stages, me, m, -1), key, answer)
        agreed[m] = CachedMicroBatch(keys[m], runs_blocks)
    return agreed
