"""Seconds of a model's blocks on a device, each priced as one of its own half.

Entry points: :func:`blocks_s` for stages, :func:`halves_of` and :func:`by_block` for other sums over blocks,
:func:`mean_block` for what only wants a device's pace. An encoder-decoder's blocks are those of its encoder and, from
``table.num_encoder_blocks`` on, those of its decoder; of any other model all are alike. Blocks of one half are counted
and multiplied, never added up one by one, so that a stage takes the same seconds to the last bit wherever it is priced.
"""

from __future__ import annotations

from typing import Any, TypeVar, overload

import numpy as np
import numpy.typing as npt

from partitioner.device import BlockSeconds, BlockTimings
from partitioner.model import ModelTable
from partitioner.place import Ints
from partitioner.shape import JobShape

Floats = npt.NDArray[np.float64]

Block = TypeVar("Block", int, Ints)
"""A number, or an array of them."""


def halves_of(table: ModelTable, timings: BlockTimings) -> tuple[tuple[int, int, BlockSeconds], ...]:
    """Ranges ``[start, end)`` of blocks that are alike, each with the seconds of one of them."""
    border, end = table.num_encoder_blocks, table.num_blocks
    if not border:
        return ((0, end, timings.block),)
    return ((0, border, timings.block), (border, end, timings.decoder_block))


@overload
def blocks_s(
    table: ModelTable, shape: JobShape, timings: BlockTimings, start: int, end: int, *, checkpointing: bool
) -> tuple[float, float]: ...


@overload
def blocks_s(
    table: ModelTable, shape: JobShape, timings: BlockTimings, start: Ints, end: Ints, *, checkpointing: bool
) -> tuple[Floats, Floats]: ...


def blocks_s(
    table: ModelTable, shape: JobShape, timings: BlockTimings, start: Block, end: Block, *, checkpointing: bool
) -> tuple[Any, Any]:
    """Forward and backward seconds of one micro-batch through blocks ``[start, end)``, embedding and head apart.

    Frozen blocks below the first trainable one count over as many steps as they run in, and have no backward pass.

    Args:
        table: the model.
        shape: the job.
        timings: of a device, for the shape's micro-batch.
        start: first block, or an array of them.
        end: one past the last block, likewise.
        checkpointing: blocks are recomputed in the backward pass.

    Returns:
        Numbers, or arrays of the arguments' common shape.
    """
    first_trained = shape.first_trainable_block
    forward_s: Any = 0.0
    backward_s: Any = 0.0
    for first, last, block in halves_of(table, timings):
        num_all = _num_between(start, end, first, last)
        num_trained = _num_between(start, end, min(max(first, first_trained), last), last)
        forward_s = forward_s + (num_trained + shape.frozen_share * (num_all - num_trained)) * block.forward_s
        backward_s = backward_s + num_trained * (block.backward_s + (block.recompute_s if checkpointing else 0.0))
    return forward_s, backward_s


def _num_between(start: Block, end: Block, first: int, last: int) -> Block:
    """Blocks of [start, end) that lie in [first, last)."""
    return _num_below(end, first, last) - _num_below(start, first, last)


def _num_below(block: Block, first: int, last: int) -> Block:
    """Blocks of [first, last) below one: a comparison is 0 or 1, of a number as of an array."""
    return (block > first) * (block - first) - (block > last) * (block - last)


def by_block(table: ModelTable, of_block: float, of_decoder: float) -> Floats:
    """One value for every block, [num_blocks]: the second for those of a decoder that has an encoder."""
    first_of_decoder = table.num_encoder_blocks or table.num_blocks
    found: Floats = np.where(np.arange(table.num_blocks) < first_of_decoder, of_block, of_decoder)
    return found


def mean_block(table: ModelTable, timings: BlockTimings) -> BlockSeconds:
    """A block of the model as a mean over all of them."""
    halves = halves_of(table, timings)
    if len(halves) == 1:
        return halves[0][2]
    shares = [(last - first) / table.num_blocks for first, last, _ in halves]
    parts = zip(*(block for _, _, block in halves), strict=True)
    return BlockSeconds(*(sum(share * s for share, s in zip(shares, part, strict=True)) for part in parts))
