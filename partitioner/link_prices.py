"""What a job's layouts cost on their links: messages between stages, and replicas that add up their gradients."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from partitioner.cost import SUM_MESSAGE_BYTES, message_bytes
from partitioner.device import LinkProfile
from partitioner.layout import Group, Layout
from partitioner.replay import Floats
from partitioner.rooms import Rooms
from partitioner.sum_path import sum_factors


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
        """Seconds in which the replicas of a stage add up their gradients; see :mod:`partitioner.sum_path`."""
        if len(layout[k]) == 1:
            return 0.0
        seconds, params = self.sum_s_by_blocks(layout, k), self._params_at(layout, k)
        last_bytes = min(SUM_MESSAGE_BYTES, self.shape.sum_bytes * float(params[end] - params[start]))
        return float(seconds[end] - seconds[start]) + last_bytes * self._sum_factors[self._sum_key(layout, k)][1]

    def sum_s_by_blocks(self, layout: Layout, k: int) -> Floats:
        """Prefix sums over blocks of :meth:`sum_s` without the last message: [end] - [start] is that of a stage.

        Latencies are left out.
        """
        if len(layout[k]) == 1:
            return np.zeros(self.table.num_blocks + 1)
        key = self._sum_key(layout, k)
        if key not in self._sum_factors:
            group, owners = key
            if self.shape.replicas_fold:
                owners = tuple(range(len(group)))
            self._sum_factors[key] = sum_factors(owners, (1.0 / self.bandwidth[np.ix_(group, group)]).tolist())
        return self._params_at(layout, k) * (self.shape.sum_bytes * self._sum_factors[key][0])

    def _sum_key(self, layout: Layout, k: int) -> tuple[Group, tuple[int, ...]]:
        return layout[k], self.owners(layout[k], is_alone=len(layout) == 1)

    def _params_at(self, layout: Layout, k: int) -> Floats:
        """Prefix sums of a stage's adapter parameters; those outside the blocks count with the first or last block."""
        params: Floats = self._params_before.copy()
        if k == 0:
            params[1:] += self.shape.first_trainable_params
        if k == len(layout) - 1:
            params[-1] += self.shape.last_trainable_params
        return params
