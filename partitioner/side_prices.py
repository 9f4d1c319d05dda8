"""What later epochs of a job with a side network cost, on the states that the activation cache holds.

Entry point: :class:`SidePrices`, which takes the quicker of the ways that the job allows: in the pipeline's own stages,
or data-parallel.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from partitioner.cached_epoch import (
    READ_BYTES_PER_S,
    SideDevice,
    cached_step,
    num_side_params,
    side_device,
    side_worker_bytes,
)
from partitioner.cached_stages import SideStage, cuts_by_speed, part_of, side_message_bytes, side_work, staged_step
from partitioner.layout import Cuts, Group, Layout
from partitioner.link_prices import LinkPrices
from partitioner.plan import CachedStep


class SidePrices(LinkPrices):
    """Seconds of steps from the activation cache, and of all steps of a job together."""

    @cached_property
    def _cached(self) -> dict[Group | frozenset[int], CachedStep | None]:
        return {}

    @cached_property
    def _staged(self) -> dict[tuple[Layout, Cuts | None], CachedStep]:
        return {}

    @cached_property
    def _side_parts(self) -> dict[tuple[int, int, int], SideDevice]:
        return {}

    def cached_step(self, layout: Layout, cuts: Cuts | None = None) -> CachedStep | None:
        """The quickest step from the activation cache over the layout's devices; None: the job has none, or no room.

        Args:
            layout: the pipeline's.
            cuts: its stages' borders; None: a guess in proportion to the devices' speeds.
        """
        if not self.shape.side_reduction:
            return None
        ways = []
        if "data-parallel" in self.shape.cached_ways and (found := self._data_parallel_step(layout)) is not None:
            ways.append(found)
        if "stages" in self.shape.cached_ways:
            ways.append(self._staged_step(layout, cuts))
        return min(ways, key=lambda way: way.step_s, default=None)

    def _data_parallel_step(self, layout: Layout) -> CachedStep | None:
        used = frozenset(device for group in layout for device in group)
        key = layout[0] if len(layout) == 1 else used
        if key not in self._cached:
            roomy = [i for i in sorted(used) if self.room_bytes[i] >= self._side_worker_bytes]
            stays = len(layout) == 1 and len(roomy) == len(used)
            self._cached[key] = cached_step(
                [self._side_devices[i] for i in roomy],
                self.bandwidth[np.ix_(roomy, roomy)].tolist(),
                num_micro_batches=self.num_micro_batches,
                gradient_bytes=self.shape.sum_bytes * num_side_params(self.shape),
                standing=[roomy.index(i) for i in layout[0]] if stays else (),
            )
        return self._cached[key]

    @cached_property
    def _side_worker_bytes(self) -> int:
        return side_worker_bytes(self.table, self.shape)

    @cached_property
    def _side_devices(self) -> list[SideDevice]:
        """Every device with the whole side network."""
        return [
            side_device(self.table, self.shape, device, self.shape.entry_token_bytes, READ_BYTES_PER_S)
            for device in self.devices
        ]

    def _staged_step(self, layout: Layout, cuts: Cuts | None) -> CachedStep:
        key = layout, cuts
        if key not in self._staged:
            speeds = [1.0 / max(device.micro_batch_s, 1e-12) for device in self._side_devices]
            borders = cuts or cuts_by_speed(layout, speeds, self._mean_side_work)
            self._staged[key] = staged_step([self._side_stage(layout, k, borders) for k in range(len(layout))])
        return self._staged[key]

    @cached_property
    def _mean_side_work(self) -> list[float]:
        """What the side block of every block computes, as a mean over the devices."""
        found = np.mean([side_work(self.table, self.shape, device.timings) for device in self.devices], axis=0)
        return [float(work) for work in found]

    def _side_stage(self, layout: Layout, k: int, cuts: Cuts) -> SideStage:
        group, (start, end) = layout[k], cuts[k : k + 2]
        below = layout[k + 1] if k + 1 < len(layout) else ()
        links = self._side_links
        return SideStage(
            replicas=tuple([self._side_part(i, start, end) for i in group]),
            owners=self.owners(group, is_alone=len(layout) == 1),
            link_busy_s=max([links[i][j][0] for i in group for j in below], default=0.0),
            link_latency_s=max([links[i][j][1] for i in group for j in below], default=0.0),
            sum_s=self.sum_s(layout, k, start, end),
        )

    def _side_part(self, device: int, start: int, end: int) -> SideDevice:
        key = device, start, end
        if key not in self._side_parts:
            timings = self.devices[device].timings
            self._side_parts[key] = part_of(self._side_devices[device], self.table, self.shape, timings, start, end)
        return self._side_parts[key]

    @cached_property
    def _side_links(self) -> list[list[tuple[float, float]]]:
        """Seconds that a micro-batch's side state occupies the link between any two devices, and its latency."""
        busy_s = side_message_bytes(self.table, self.shape) / self.bandwidth
        return [list(zip(*rows, strict=True)) for rows in zip(busy_s.tolist(), self.latency_s.tolist(), strict=True)]

    def cost_s(self, layout: Layout, step_s: float) -> float:
        """Mean seconds of all steps of a job, where one through the blocks takes ``step_s``.

        Where nobody has room for the side network, later steps count as if the blocks ran in them too.
        """
        share = self.shape.cached_steps_share
        if not share or (cached := self.cached_step(layout)) is None:
            return step_s
        return (step_s + share * cached.step_s) / (1 + share)

    def step_limit_s(self, layout: Layout, limit_s: float) -> float:
        """The step through the blocks with which a layout's cost is ``limit_s``."""
        share = self.shape.cached_steps_share
        if not share or (cached := self.cached_step(layout)) is None:
            return limit_s
        return limit_s * (1 + share) - share * cached.step_s
