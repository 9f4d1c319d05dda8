"""Seconds of one micro-batch on a stage and on the link behind it."""

from __future__ import annotations

from dataclasses import dataclass

from partitioner.activations import boundary_bytes
from partitioner.block_seconds import blocks_s
from partitioner.device import DeviceProfile, LinkProfile
from partitioner.model import ModelTable
from partitioner.shape import JobShape

SUM_MESSAGE_BYTES = 1 << 20
"""Adapters' gradients travel between replicas in messages of at most so many bytes, unless one parameter has more."""

SIDE_FORWARD_SHARE = 0.5
"""Of a side network's backward pass: it multiplies twice where the forward pass multiplies once."""


@dataclass(frozen=True, slots=True)
class StageCost:
    """Seconds of one micro-batch on one stage and on the link to the next one."""

    forward_s: float
    backward_s: float
    """Recomputation included; 0 where nothing at or below this stage is trained."""
    link_busy_s: float = 0.0
    """How long one message to the next stage occupies the link; 0 on the last stage."""
    link_latency_s: float = 0.0
    has_backward: bool = True
    gets_gradient: bool = True
    """The next stage sends a gradient back to this one."""

    @property
    def compute_s(self) -> float:
        """Forward and backward of one micro-batch."""
        return self.forward_s + self.backward_s

    @property
    def link_s(self) -> float:
        """One message to the next stage, and the gradient that comes back."""
        return (2 if self.gets_gradient else 1) * (self.link_busy_s + self.link_latency_s)

    @property
    def round_trip_s(self) -> float:
        """One micro-batch through the stage and over its link, there and back."""
        return self.compute_s + self.link_s


def stage_cost(
    table: ModelTable,
    shape: JobShape,
    device: DeviceProfile,
    *,
    start_block: int,
    end_block: int,
    checkpointing: bool,
    link: LinkProfile | None,
    keeps_heap: bool = True,
) -> StageCost:
    """Seconds of blocks ``[start_block, end_block)`` on a device, frozen ones over as many steps as they run in.

    Checkpointing adds to every block's backward pass what recomputing was measured to take. Blocks below the first
    trainable one have no backward pass, and a stage of only such blocks gets no gradient.

    Args:
        table: the model.
        shape: the job; its micro-batch is the one that the device's timings are of.
        device: the device.
        start_block: first block; 0 has the embedding with it.
        end_block: one past the last block; the model's last block has final norm, head and loss with it.
        checkpointing: blocks are recomputed in the backward pass.
        link: the link to the next stage; None on the last stage.
        keeps_heap: malloc keeps what is freed.
    """
    timings = device.timings if keeps_heap else device.timings.mapped
    num_trained = end_block - max(start_block, min(shape.first_trainable_block, end_block))
    has_head_backward = end_block == table.num_blocks and (num_trained > 0 or shape.last_trainable_params > 0)
    forward_s, backward_s = blocks_s(table, shape, timings, start_block, end_block, checkpointing=checkpointing)
    if start_block == 0:
        forward_s += shape.frozen_share * timings.embedding_s
    if end_block == table.num_blocks:
        forward_s += timings.head_forward_s
        backward_s += timings.head_backward_s if has_head_backward else 0.0
    return StageCost(
        forward_s=forward_s,
        backward_s=backward_s,
        link_busy_s=0.0 if link is None else message_bytes(table, shape) / link.bandwidth_bytes_per_s,
        link_latency_s=0.0 if link is None else link.latency_s,
        has_backward=num_trained > 0 or has_head_backward,
        gets_gradient=link is not None and num_trained > 0,
    )


def message_bytes(table: ModelTable, shape: JobShape, codec: str | None = None) -> int:
    """Bytes of the hidden states (or of their gradient) of one micro-batch on the wire; None: in the job's codec."""
    compute_bytes = boundary_bytes(table, shape)
    if (codec or shape.codec) == "raw":
        return compute_bytes
    return compute_bytes * min(2, shape.dtype_bytes) // shape.dtype_bytes
