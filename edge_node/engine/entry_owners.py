"""Entries of the activation cache on the device that will train from them, while the pipeline still computes them.

Epochs from the cache run without the backbone: every device trains on some places of every step, and needs what all
blocks gave of those micro-batches. Which place of a step is whose (its *owner*) is known from the start, and a
micro-batch keeps its place in all epochs (:func:`plutino.data.batches.repeated_micro_batches`). So every stage hands
its entries to their owner at the end of the step in which they were made, place after place and in the order of states;
nothing is left to move when the backbone goes.

A stage sends the entries of a micro-batch once, and then that it has nothing new. Owners take what comes in the order
in which everyone sends, so that nobody waits for each other in a circle however small the queues are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from edge_node.activation_cache.places import state_names_between
from edge_node.activation_cache.stage_cache import StageCache
from edge_node.engine.cached_micro_batches import CachedMicroBatch
from edge_node.transport.base import MessageKey, MessageKind, Peer

if TYPE_CHECKING:
    from edge_node.engine.seat import Seat
    from edge_node.engine.unit import UnitInput


class EntryOwners:
    """Who keeps which entries, as one worker knows it.

    Args:
        owners: worker that keeps what is computed of a step's micro-batch m; longer steps wrap around. Empty: everyone
            keeps what it computes, and nothing else.
    """

    def __init__(self, owners: Sequence[Peer]) -> None:
        self._owners = tuple(owners)
        self._handed: set[bytes] = set()

    @property
    def peers(self) -> frozenset[Peer]:
        """All owners."""
        return frozenset(self._owners)

    def of(self, m: int) -> Peer | None:
        """The owner of a step's micro-batch."""
        return self._owners[m % len(self._owners)] if self._owners else None

    def hand_over(self, seat: Seat, work: UnitInput, cache: StageCache, cached: Mapping[int, CachedMicroBatch]) -> None:
        """Send and take the entries of one step's micro-batches.

        Raises:
            PeerLostError: a peer went away.
            UnitCancelledError: the coordinator abandoned the step.
        """
        for m in range(work.num_micro_batches):
            owner = self.of(m)
            if owner is None:
                return
            runs = [Peer(stage, shape.replica_of(m)) for stage, shape in enumerate(seat.stages)]
            if seat.me == owner:
                self._take(seat, work, cache, m, [peer for peer in runs if peer != owner])
            elif seat.me in runs:
                self._send(seat, work, cache, m, owner, cached[m].keys)

    def _send(self, seat: Seat, work: UnitInput, cache: StageCache, m: int, owner: Peer, keys: Tensor) -> None:
        name_of_all = bytes(keys.numpy())
        is_new = name_of_all not in self._handed
        for position, name in enumerate(cache.names):
            entries = cache.entries(name, keys) if is_new else None
            message = {"keys": keys, "sizes": torch.zeros(len(keys), dtype=torch.int64), "data": torch.zeros(0).byte()}
            if entries is not None:
                message["sizes"] = torch.tensor([len(entry) for entry in entries], dtype=torch.int64)
                message["data"] = torch.cat(entries)
            key = MessageKey(MessageKind.CACHE_ENTRIES, work.unit, m, position)
            seat.transport.send(owner, key, message)
        self._handed.add(name_of_all)

    def _take(self, seat: Seat, work: UnitInput, cache: StageCache, m: int, senders: Sequence[Peer]) -> None:
        layout = seat.stage.side_layout
        assert layout is not None, "entries are kept for a side network"
        keys: Tensor | None = None
        for sender in senders:
            shape = seat.stages[sender.stage_index]
            for position, name in enumerate(state_names_between(layout, shape.start_block, shape.end_block)):
                key = MessageKey(MessageKind.CACHE_ENTRIES, work.unit, m, position)
                message = seat.transport.receive(sender, key)
                cache.keep(name, message["keys"], message["data"].split(message["sizes"].tolist()))
                keys = message["keys"].clone()
        if keys is not None:
            cache.count_missing(keys)
