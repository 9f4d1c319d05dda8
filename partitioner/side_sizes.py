"""How many parameters a side network would add."""

from __future__ import annotations

from partitioner.adapter_table import AdapterTable, BlockAdapter
from partitioner.model import ModelTable
from plutino.families import family_of
from plutino.job.method import ParallelAdaptersConfig
from plutino.side_layout import check_reduction, followed_blocks


def side_network_sizes(table: ModelTable, method: ParallelAdaptersConfig) -> AdapterTable:
    """Side blocks have 1 / k^2 of a block's matrices and 1 / k of its vectors, k = ``reduction``.

    Beside each stand a projection D -> D / k with bias and a gate, below the first one another projection, behind the
    last one the final norm and the projection to what the head reads.
    """
    reduction, hidden = method.reduction, table.hidden_size
    family, has_whole_heads = family_of(table.family), method.heads == "whole"
    sizes = {"hidden": hidden, "head_dim": table.head_dim, "inner": table.intermediate_size}
    check_reduction(family, reduction, sizes | {"kv_heads": table.num_kv_heads}, has_whole_heads=has_whole_heads)
    # Norms of single heads are as wide as these.
    kept = 2 * (table.head_dim - table.head_dim // reduction) if has_whole_heads and family.qk_norm == "head" else 0
    num_encoder_blocks = table.num_encoder_blocks
    chosen = followed_blocks(method.blocks, table.num_blocks, num_encoder_blocks)
    # The side state of an encoder-decoder's target starts beside its decoder.
    entries = {chosen[0], next(block for block in chosen if block >= num_encoder_blocks)}
    projection = hidden // reduction * (hidden + 1)
    blocks = []
    for index in range(table.num_blocks):
        matrices = sum(linear.in_features * linear.out_features for linear in table.block_linears[index])
        side_block = matrices // reduction**2 + _vector_params(table, index) // reduction + kept + table.repeated_params
        params = side_block + projection + 1 + (projection if index in entries else 0)
        blocks.append(BlockAdapter(params=params if index in chosen else 0, rank_sum=0, linears=()))
    out_width = table.head_params // table.vocab_size or hidden
    # Where the head reads another width, what stands before it is a projection and no norm; an encoder has a pooler.
    has_norm = out_width == hidden and table.head_params > 0
    norm_params = table.final_params // reduction if has_norm else 0
    return AdapterTable(
        blocks=tuple(blocks),
        first_params=0,
        last_params=norm_params + out_width * (hidden // reduction + 1),
        size_setting=method.size_setting,
        side_reduction=reduction,
        side_has_whole_heads=has_whole_heads,
        prunes_by_gradients=method.prunes_by_gradients,
    )


def _vector_params(table: ModelTable, index: int) -> int:
    """Parameters of a block that are no matrix of a linear layer, without the biases that a half's blocks share."""

    def of(block: int) -> int:
        matrices = sum(linear.in_features * linear.out_features for linear in table.block_linears[block])
        has_table = table.num_encoder_blocks > 0 and block in (0, table.num_encoder_blocks)
        return table.block_params[block] - matrices - (table.repeated_params if has_table else 0)

    # What stands before a decoder is counted with its first block.
    is_first_of_decoder = index == table.num_encoder_blocks > 0 and index + 1 < table.num_blocks
    return of(index + 1) if is_first_of_decoder else of(index)
