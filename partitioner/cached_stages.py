"""Seconds of a step from the activation cache in the pipeline's own stages.

Entry point: :func:`staged_step`. Every entry stays with the stage that computed it, and every stage trains its own part
of the side network: no gradient of it travels, but for replicas of a stage, and only the narrow side state crosses a
border. Where links are slow beside the side network that is the shorter way by far; PAC (arXiv:2408.10746 sect. 4.2)
has the other one alone, data-parallel epochs (:mod:`partitioner.cached_epoch`), whose gradients cross the network whole
in every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from partitioner.activations import micro_batch_tokens, target_tokens
from partitioner.block_seconds import Floats, by_block
from partitioner.cached_epoch import SideDevice
from partitioner.device import BlockTimings
from partitioner.layout import Cuts, Layout
from partitioner.model import ModelTable
from partitioner.plan import CachedStep
from partitioner.shape import JobShape

_FP32_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class SideStage:
    """One stage's part of a step."""

    replicas: tuple[SideDevice, ...]
    """Each with the seconds of one micro-batch."""
    owners: tuple[int, ...]
    """The replica that runs micro-batch m."""
    link_busy_s: float
    """One micro-batch's side state on the slowest link to the next stage; 0 on the last one."""
    link_latency_s: float
    sum_s: float
    """Until replicas have added up their gradients."""

    @property
    def busiest(self) -> tuple[int, SideDevice]:
        """The replica that computes longest, and how many micro-batches it has."""
        counts = [self.owners.count(place) for place in range(len(self.replicas))]
        place = max(range(len(counts)), key=lambda each: counts[each] * self.replicas[each].micro_batch_s)
        return counts[place], self.replicas[place]


def staged_step(stages: Sequence[SideStage]) -> CachedStep:
    """A step of all stages: the first micro-batch's way there and back, then one after the other at the slowest's pace.

    Messages pass beside the passes and in both directions at once.
    """
    num_micro_batches = len(stages[0].owners)
    trip_s = sum(max(device.micro_batch_s for device in stage.replicas) for stage in stages)
    trip_s += 2 * sum(stage.link_busy_s + stage.link_latency_s for stage in stages)
    slowest = max(stages, key=lambda stage: stage.busiest[0] * stage.busiest[1].micro_batch_s)
    count, device = slowest.busiest
    pace_s = max(count * device.micro_batch_s / num_micro_batches, *(stage.link_busy_s for stage in stages))
    sum_s = max(stage.sum_s for stage in stages)
    return CachedStep(
        step_s=trip_s + (num_micro_batches - 1) * pace_s + sum_s,
        in_stages=True,
        agent_ids=tuple(replica.agent_id for stage in stages for replica in stage.replicas),
        owners=(),
        compute_s=count * device.compute_s,
        read_s=count * device.read_s,
        reduce_s=sum_s,
    )


def side_work(table: ModelTable, shape: JobShape, timings: BlockTimings) -> Floats:
    """What every block's side block computes on a device, [num_blocks], in those of the first half; 0: it has none."""
    block_s = timings.block.backward_s
    ratio = timings.decoder_block.backward_s / block_s if block_s else 1.0
    return _has_side(shape) * by_block(table, 1.0, ratio)


def side_entries(table: ModelTable, shape: JobShape) -> Floats:
    """Tokens of a micro-batch that every block's side block reads an entry of, [num_blocks]."""
    num_targets = shape.micro_batch_rows * target_tokens(shape)
    return _has_side(shape) * by_block(table, micro_batch_tokens(shape), num_targets)


def _has_side(shape: JobShape) -> Floats:
    """1 for every block with a side block beside it, else 0."""
    return (np.array(shape.adapter_params) > 0).astype(float)


def part_of(
    whole: SideDevice, table: ModelTable, shape: JobShape, timings: BlockTimings, start: int, end: int
) -> SideDevice:
    """The seconds of some blocks' part of a micro-batch, from those of the whole side network on the same device.

    Args:
        whole: all of it, with the head.
        table: the model.
        shape: the job, with a side network.
        timings: the device's.
        start: first block.
        end: one past the last block.
    """
    computed, read = (
        float(of_blocks[start:end].sum() / of_blocks.sum())
        for of_blocks in (side_work(table, shape, timings), side_entries(table, shape))
    )
    head_s = timings.head_forward_s + timings.head_backward_s
    compute_s = computed * (whole.compute_s - head_s) + (head_s if end == table.num_blocks else 0.0)
    return SideDevice(agent_id=whole.agent_id, compute_s=compute_s, read_s=read * whole.read_s)


def side_message_bytes(table: ModelTable, shape: JobShape) -> int:
    """Bytes of one micro-batch's side state, which alone crosses a border where no block runs."""
    num_tokens = micro_batch_tokens(shape)
    if table.num_encoder_blocks:
        num_tokens += shape.micro_batch_rows * target_tokens(shape)
    return num_tokens * _FP32_BYTES * (table.hidden_size // shape.side_reduction)


def cuts_by_speed(layout: Layout, speeds: Sequence[float], work: Sequence[float]) -> Cuts:
    """Block borders in proportion to what the devices of each stage do in a second, at least a block a stage.

    Args:
        layout: devices of the stages.
        speeds: of every device.
        work: of every block, at least as many as stages; only its proportions count.
    """
    num_blocks, below = len(work), np.concatenate([[0.0], np.cumsum(work)])
    of_stage = [sum(speeds[device] for device in group) for group in layout]
    total, passed, borders = sum(of_stage), 0.0, [0]
    for k, speed in enumerate(of_stage, start=1):
        passed += speed
        left = len(layout) - k
        wanted = round(float(np.interp(below[-1] * passed / total, below, range(num_blocks + 1))))
        borders.append(min(num_blocks - left, max(borders[-1] + 1, wanted)))
    return tuple(borders)
