"""What a job's layouts cost on their links: messages between stages, and replicas that add up their gradients."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from partitioner.block_seconds import by_block
from partitioner.cost import SIDE_FORWARD_SHARE, SUM_MESSAGE_BYTES, message_bytes
from partitioner.device import LinkProfile
from partitioner.layout import Group, Layout
from partitioner.place import Ints
from partitioner.replay import Floats
from partitioner.rooms import Rooms
from partitioner.sum_path import BUSY_S_PER_BYTE, left_over_s, sum_factors


class LinkPrices(Rooms):
    """Seconds on the links between the devices of one job's fleet."""

    @cached_property
    def message_bytes(self) -> int:
        """Of a message over a boundary in the job's codec."""
        return message_bytes(self.table, self.shape)

    @cached_property
    def rounded_bytes(self) -> int:
        """Of a message over a boundary in bf16."""
        return message_bytes(self.table, self.shape, "bf16")

    @cached_property
    def _sum_factors(self) -> dict[tuple[Group, tuple[int, ...]], tuple[float, float]]:
        return {}

    @cached_property
    def _profiles(self) -> list[list[LinkProfile]]:
        return self.links.matrix(self.devices)

    @cached_property
    def bandwidth(self) -> Floats:
        """Bytes a second between any two devices."""
        return np.array([[link.bandwidth_bytes_per_s for link in row] for row in self._profiles])

    @cached_property
    def busy_s(self) -> Floats:
        """Seconds that one message occupies the link between any two devices."""
        return self.message_bytes / self.bandwidth

    @cached_property
    def latency_s(self) -> Floats:
        """Seconds until a message's last byte is there after it has left."""
        return np.array([[link.latency_s for link in row] for row in self._profiles])

    @cached_property
    def least_busy_s(self) -> Floats:
        """The same of the smallest message that any boundary carries."""
        return (self.rounded_bytes if self.shape.bf16_borders else self.message_bytes) / self.bandwidth

    @cached_property
    def _links(self) -> tuple[list[list[tuple[float, float]]], list[list[tuple[float, float]]]]:
        """Of boundaries in the job's codec, and of those in bf16."""
        found = []
        for num_bytes in (self.message_bytes, self.rounded_bytes):
            rows = zip((num_bytes / self.bandwidth).tolist(), self.latency_s.tolist(), strict=True)
            found.append([list(zip(*row, strict=True)) for row in rows])
        return found[0], found[1]

    def codec_at(self, border: int) -> str:
        """What a boundary at a block border carries."""
        return "bf16" if border in self.shape.bf16_borders else self.shape.codec

    @cached_property
    def _params_before(self) -> Floats:
        """Adapter parameters of the blocks before each block, and of all at the end."""
        found: Floats = np.concatenate([[0.0], np.cumsum(self.shape.adapter_params)])
        return found

    def links_below(self, layout: Layout, k: int, *, is_rounded: bool) -> tuple[tuple[tuple[float, float], ...], ...]:
        """Seconds on the links behind stage k, see :attr:`StageGroup.links`: of bf16, or of the job's codec."""
        below = layout[k + 1] if k + 1 < len(layout) else ()
        links = self._links[is_rounded]
        return tuple(tuple(links[device][other] for other in below) for device in layout[k])

    def sum_s(self, layout: Layout, k: int, start: int, end: int) -> float:
        """Seconds by which a step gets longer, because the replicas of a stage add up their gradients.

        See :mod:`partitioner.sum_path`.
        """
        if len(layout[k]) == 1:
            return 0.0
        beside_s = self._beside_s(layout, k)
        num_bytes = self.sum_bytes(layout, k, start, end)
        pace, way = self._factors(layout, k)
        # The topmost block's gradients come first, when its pass is over.
        meanwhile_s = float(beside_s[end - 1] - beside_s[start])
        return left_over_s(num_bytes * pace, meanwhile_s, num_bytes) + min(SUM_MESSAGE_BYTES, num_bytes) * way

    def sum_bytes(self, layout: Layout, k: int, start: int, end: int) -> int:
        """Of a stage's whole gradient on its way from one replica to another."""
        params = self._params_at(layout, k)
        return self.shape.sum_bytes * int(params[end] - params[start])

    def sum_owners(self, layout: Layout, k: int) -> tuple[int, ...]:
        """The replicas that the running sum of a stage comes to, by micro-batch."""
        if self.shape.replicas_fold:
            return tuple(range(len(layout[k])))
        return self.owners(layout[k], is_alone=len(layout) == 1)

    def least_sum_s(self, layout: Layout, k: int, starts: Ints, ends: Ints) -> Floats:
        """No more than :meth:`sum_s` of stages with blocks [starts, ends), shape (N,)."""
        if len(layout[k]) == 1:
            return np.zeros(len(starts))
        params, beside_s = self._params_at(layout, k), self._beside_s(layout, k)
        num_bytes = self.shape.sum_bytes * (params[ends] - params[starts])
        link_s = num_bytes * self._factors(layout, k)[0] - (beside_s[ends] - beside_s[starts])
        found: Floats = np.maximum(link_s, BUSY_S_PER_BYTE * num_bytes)
        return found

    def _factors(self, layout: Layout, k: int) -> tuple[float, float]:
        """Of a stage with several replicas, see :func:`partitioner.sum_path.sum_factors`; latencies are left out."""
        key = group, owners = layout[k], self.sum_owners(layout, k)
        if key not in self._sum_factors:
            self._sum_factors[key] = sum_factors(owners, (1.0 / self.bandwidth[np.ix_(group, group)]).tolist())
        return self._sum_factors[key]

    def _beside_s(self, layout: Layout, k: int) -> Floats:
        """Prefix sums over blocks of what any replica computes while sums travel; [end] - [start] is a stage's.

        That is its last backward pass, and where it has the whole model the frozen part of its next forward pass.
        """
        if layout[k] not in self._beside:
            self._beside[layout[k]] = np.min([self._beside_of(i) for i in layout[k]], axis=0)
        backward_s, ahead_s = self._beside[layout[k]]
        found: Floats = backward_s + ahead_s if len(layout) == 1 else backward_s
        return found

    @cached_property
    def _beside(self) -> dict[Group, Floats]:
        return {}

    def _beside_of(self, device: int) -> Floats:
        """Prefix sums of one device's backward passes, and of frozen passes beside a side network: [2, blocks + 1]."""
        timings = self.devices[device].timings
        halves = timings.block, timings.decoder_block
        trains = np.arange(self.table.num_blocks) >= self.shape.first_trainable_block
        backward_s = np.where(trains, by_block(self.table, *(block.backward_s for block in halves)), 0.0)
        ahead_s = np.zeros(self.table.num_blocks)
        if self.shape.side_reduction:
            # What a block's forward pass takes beyond the side network's, whose backward pass is all that is measured.
            frozen_s = (max(0.0, block.forward_s - SIDE_FORWARD_SHARE * block.backward_s) for block in halves)
            ahead_s = by_block(self.table, *frozen_s)
        # The sums of cards follow their passes.
        is_beside = not self.devices[device].is_card
        found: Floats = is_beside * np.concatenate([np.zeros((2, 1)), np.cumsum([backward_s, ahead_s], axis=1)], axis=1)
        return found

    def _params_at(self, layout: Layout, k: int) -> Floats:
        """Prefix sums of a stage's adapter parameters; those outside the blocks count with the first or last block."""
        params: Floats = self._params_before.copy()
        if k == 0:
            params[1:] += self.shape.first_trainable_params
        if k == len(layout) - 1:
            params[-1] += self.shape.last_trainable_params
        return params
