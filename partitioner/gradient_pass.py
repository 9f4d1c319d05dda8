"""Bytes of the pass that sends gradients through frozen blocks, before the first step, to prune by them."""

from __future__ import annotations

from partitioner.activations import micro_batch_tokens, saved_block_bytes
from partitioner.model import ModelTable
from partitioner.shape import JobShape

_FP32_BYTES = 4

_STRIP_BYTES_PER_PLACE = 8 * 128
"""128 rows or columns of a matrix at once, in fp64."""


def gradient_block_bytes(table: ModelTable, shape: JobShape, block: int) -> int:
    """Bytes that one block keeps of one micro-batch where its weights' own gradients are looked at.

    Its matrices keep their inputs, as adapted ones do.
    """
    plain = shape.model_copy(update={"side_reduction": 0, "adapted_linears": (), "adapter_cast_params": ()})
    return saved_block_bytes(table, plain, block)


def matrix_gradient_bytes(table: ModelTable, shape: JobShape) -> int:
    """Bytes of the largest weight gradient of a block, and of fp32 copies of both tensors that it is the product of.

    Beside it stands a strip of it in fp64, in which its sums are taken.
    """
    num_tokens = micro_batch_tokens(shape)
    return max(
        _FP32_BYTES
        * (linear.in_features * linear.out_features + num_tokens * (linear.in_features + linear.out_features))
        + _STRIP_BYTES_PER_PLACE * max(linear.in_features, linear.out_features)
        for linears in table.block_linears
        for linear in linears
    )
