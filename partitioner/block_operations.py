"""Operations of one block's forward pass, counted: what a device's seconds follow from where nobody measured them."""

from __future__ import annotations

from partitioner.activations import target_tokens
from partitioner.model import ModelTable
from partitioner.shape import JobShape
from plutino.families import family_of
from plutino.family import ENCODER_OUTPUT


def block_operations(table: ModelTable, shape: JobShape) -> float:
    """Of one micro-batch in a mean block, of an encoder-decoder in one of its encoder.

    Two operations a parameter and token; attention's own products grow with the row's square.
    """
    num_blocks = table.num_encoder_blocks or table.num_blocks
    row_tokens = shape.source_tokens or shape.row_tokens
    tokens = shape.micro_batch_rows * row_tokens
    attention = 4 * tokens * row_tokens * table.num_heads * table.head_dim
    return 2 * tokens * (sum(table.block_params[:num_blocks]) / num_blocks) + attention


def decoder_block_operations(table: ModelTable, shape: JobShape) -> float:
    """Of one micro-batch in a mean block of an encoder-decoder's decoder.

    Its tokens are the target's; keys and values of what it looks at are made of the source's.
    """
    linears, rules = table.block_linears[table.num_encoder_blocks :], family_of(table.family).all_linears
    read_params = sum(
        one.in_features * one.out_features
        for of_block in linears
        for one in of_block
        if rules[one.name].reads == ENCODER_OUTPUT
    ) / len(linears)
    own_params = sum(table.block_params[table.num_encoder_blocks :]) / len(linears) - read_params
    row_targets, row_sources = target_tokens(shape), shape.source_tokens or shape.row_tokens
    targets, sources = (shape.micro_batch_rows * tokens for tokens in (row_targets, row_sources))
    attention = 4 * targets * (row_targets + row_sources) * table.num_heads * table.head_dim
    return 2 * (targets * own_params + sources * read_params) + attention
