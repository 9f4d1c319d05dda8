"""Seconds of an epoch whose block outputs come from the activation cache (PAC, arXiv:2408.10746 sect. 4.2).

Entry points: :func:`cached_step`, the price from plain numbers; :func:`side_device`, such numbers of a job on a device.
The backbone is gone then: every device holds the whole side network with the head, reads its micro-batches' entries,
trains on them, and the gradients are added up, micro-batch by micro-batch in a fixed order, as replicas
of a stage do it (:mod:`partitioner.sum_path`). Shares follow speed; a device that only slows the others has
none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from partitioner.activations import micro_batch_tokens, target_tokens
from partitioner.block_seconds import halves_of
from partitioner.cost import SIDE_FORWARD_SHARE, SUM_MESSAGE_BYTES
from partitioner.device import DeviceProfile
from partitioner.layout import owners_of
from partitioner.memory import MemoryModel
from partitioner.model import ModelTable
from partitioner.place import ReplicaShare
from partitioner.plan import CachedStep
from partitioner.shape import JobShape
from partitioner.sum_path import left_over_s, sum_factors

READ_BYTES_PER_S = 500e6
"""Of entries from a disk whose rate nobody has measured: a SATA SSD's."""

_LEAST_GAIN = 0.97
"""Of a step by another order of the devices: links' rates are measured with an error of a few per cent."""

_LEFT_WITH_THE_BACKBONE = ("weights", "packed weights", "unpacking", "generation", "pruning", "loading peak")


@dataclass(frozen=True, slots=True, kw_only=True)
class SideDevice:
    """What one device needs for a micro-batch of the side network."""

    agent_id: str
    compute_s: float
    """The whole side network with head and loss, forward and backward."""
    read_s: float
    """All entries of a micro-batch, from the disk."""

    @property
    def micro_batch_s(self) -> float:
        """Alone: what is read ahead is read while sums travel."""
        return self.compute_s + self.read_s

    @property
    def beside_s(self) -> float:
        """What goes on while sums travel: the last backward pass, and reading ahead."""
        return self.compute_s / (1 + SIDE_FORWARD_SHARE) + self.read_s


def cached_step(
    devices: Sequence[SideDevice],
    bandwidth_bytes_per_s: Sequence[Sequence[float]],
    *,
    num_micro_batches: int,
    gradient_bytes: int,
    standing: Sequence[int] = (),
) -> CachedStep | None:
    """The quickest step over the fastest devices, as many as make it quicker; None: there is no device.

    Args:
        devices: all that can hold the side network.
        bandwidth_bytes_per_s: between any two of them, in their order.
        num_micro_batches: of a step.
        gradient_bytes: of one micro-batch, as they travel.
        standing: the replicas in their order, where the first epoch is data-parallel already. Who stays in place needs
            nobody else's entries, so that this order is kept if another one gains next to nothing.
    """
    by_speed = sorted(range(len(devices)), key=lambda i: (devices[i].micro_batch_s, i))
    orders = [_chained(bandwidth_bytes_per_s, by_speed[:number]) for number in range(1, len(by_speed) + 1)]
    ways = [_along(devices, bandwidth_bytes_per_s, order, num_micro_batches, gradient_bytes) for order in orders]
    best = min(ways, key=lambda step: step.step_s, default=None)
    if not standing or best is None:
        return best
    stays = _along(devices, bandwidth_bytes_per_s, standing, num_micro_batches, gradient_bytes)
    return stays if stays.step_s * _LEAST_GAIN <= best.step_s else best


def _chained(bandwidth: Sequence[Sequence[float]], group: Sequence[int]) -> list[int]:
    """The devices of a group in an order in which the sum takes the quickest link from each to a next one."""
    order = [group[0]]
    while len(order) < len(group):
        order.append(max((i for i in group if i not in order), key=lambda i: (bandwidth[order[-1]][i], -i)))
    return order


def _along(
    devices: Sequence[SideDevice],
    bandwidth: Sequence[Sequence[float]],
    order: Sequence[int],
    num_micro_batches: int,
    gradient_bytes: int,
) -> CachedStep:
    """A step of these devices, through which the sum goes in this order."""
    # Neighbouring micro-batches each: the sum comes to every device once.
    owners = tuple(sorted(owners_of([devices[i].micro_batch_s for i in order], num_micro_batches)))
    counts = [owners.count(place) for place in range(len(order))]
    busiest = max(range(len(order)), key=lambda place: counts[place] * devices[order[place]].micro_batch_s)
    pace, way = sum_factors(owners, [[1.0 / bandwidth[i][j] for j in order] for i in order])
    reduce_s = 0.0
    if len(order) > 1:
        beside_s = min(devices[i].beside_s for i in order)
        reduce_s = left_over_s(gradient_bytes * pace, beside_s, gradient_bytes)
        reduce_s += min(SUM_MESSAGE_BYTES, gradient_bytes) * way
    device = devices[order[busiest]]
    return CachedStep(
        step_s=counts[busiest] * device.micro_batch_s + reduce_s,
        agent_ids=tuple(devices[i].agent_id for i in order),
        owners=owners,
        compute_s=counts[busiest] * device.compute_s,
        read_s=counts[busiest] * device.read_s,
        reduce_s=reduce_s,
    )


def side_device(
    table: ModelTable, shape: JobShape, device: DeviceProfile, entry_token_bytes: int, read_bytes_per_s: float
) -> SideDevice:
    """A device's seconds, from those of its blocks: in a block's backward pass only the side network computes.

    Args:
        table: the model.
        shape: the job; its micro-batch is the one that the device's timings are of.
        device: the device.
        entry_token_bytes: bytes of one token at one place of the model, as the cache's codec writes it.
        read_bytes_per_s: of its disk.
    """
    timings = device.timings
    side_s = sum(
        num_side_blocks(shape, first, last) * (1 + SIDE_FORWARD_SHARE) * block.backward_s
        for first, last, block in halves_of(table, timings)
    )
    return SideDevice(
        agent_id=device.agent_id,
        compute_s=side_s + timings.head_forward_s + timings.head_backward_s,
        read_s=entry_bytes(table, shape, entry_token_bytes) / read_bytes_per_s,
    )


def entry_bytes(table: ModelTable, shape: JobShape, entry_token_bytes: int) -> int:
    """Bytes of all entries of a micro-batch that a side network is trained from."""
    num_blocks = num_side_blocks(shape)
    # What stands before the lowest side block, what each side block reads, and what the final norm gives.
    num_entry_tokens = micro_batch_tokens(shape) * (num_blocks + 2)
    if table.num_encoder_blocks:
        num_of_encoder = num_side_blocks(shape, 0, table.num_encoder_blocks)
        num_targets = shape.micro_batch_rows * target_tokens(shape)
        num_entry_tokens = micro_batch_tokens(shape) * (num_of_encoder + 1)
        num_entry_tokens += num_targets * (num_blocks - num_of_encoder + 2)
    return num_entry_tokens * entry_token_bytes


def num_side_blocks(shape: JobShape, start: int = 0, end: int | None = None) -> int:
    """Blocks of the side network, or those of them that stand beside blocks ``[start, end)``."""
    return sum(params > 0 for params in shape.adapter_params[start:end])


def num_side_params(shape: JobShape) -> int:
    """Parameters that every device trains."""
    return sum(shape.adapter_params) + shape.first_trainable_params + shape.last_trainable_params


def side_worker_bytes(table: ModelTable, shape: JobShape) -> int:
    """Job bytes of a worker with the whole side network and the head, and no backbone."""
    share = ReplicaShare(in_flight=1, gradient_copies=shape.num_micro_batches + 1, num_peers=1)
    return _beside_bytes(table, shape, 0, table.num_blocks, num_stages=1, stage_index=0, share=share)


def side_stage_bytes(
    table: ModelTable, shape: JobShape, start: int, end: int, num_stages: int, stage_index: int
) -> int:
    """Job bytes of a pipeline's worker with the side network of some blocks, and no block."""
    in_flight = min(shape.num_micro_batches, num_stages - stage_index)
    share = ReplicaShare(in_flight=in_flight, gradient_copies=shape.num_micro_batches + 1, num_peers=2)
    return _beside_bytes(table, shape, start, end, num_stages=num_stages, stage_index=stage_index, share=share)


def _beside_bytes(
    table: ModelTable,
    shape: JobShape,
    start: int,
    end: int,
    *,
    num_stages: int,
    stage_index: int,
    share: ReplicaShare,
) -> int:
    items = MemoryModel(table, shape).items(
        start, end, num_stages=num_stages, stage_index=stage_index, checkpointing=False, share=share
    )
    kept_bytes = sum(item.bytes for item in items if item.name not in _LEFT_WITH_THE_BACKBONE)
    head_bytes = (table.head_params + table.final_params) * shape.dtype_bytes
    return kept_bytes + (head_bytes if end == table.num_blocks else 0)
