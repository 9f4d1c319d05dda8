"""How peft stores the keys and values of deep prompts: one tensor for all blocks, cut here into one a block.

peft's PREFIX_TUNING has a single tensor ``prompt_embeddings`` of [virtual tokens, 2 x blocks x width]: for each block
its keys, then its values, with width = key heads x head size. A stage holds the columns of its own blocks, under
``prompt_embeddings.<block>``. Works on numpy arrays; :func:`columns_of` on tensors too.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Float32Array = NDArray[np.float32]

CHECKPOINT_KEY = "prompt_embeddings"


def block_name(block: int) -> str:
    """Global name of one block's keys and values, [virtual tokens, 2 x width]."""
    return f"{CHECKPOINT_KEY}.{block}"


def columns_of(block: int, block_columns: int) -> tuple[slice, slice]:
    """Index of a block's part of the checkpoint's tensor.

    Args:
        block: global index.
        block_columns: columns of one block, 2 x width.
    """
    return slice(None), slice(block * block_columns, (block + 1) * block_columns)


def join_blocks(parts: Mapping[str, Float32Array]) -> dict[str, Float32Array]:
    """The checkpoint of all blocks' parts."""
    return {CHECKPOINT_KEY: np.concatenate([parts[block_name(block)] for block in range(len(parts))], axis=1)}


def split_blocks(checkpoint: Mapping[str, Float32Array], num_blocks: int) -> dict[str, Float32Array]:
    """The blocks' parts of a checkpoint; the reverse of :func:`join_blocks`."""
    table = checkpoint[CHECKPOINT_KEY]
    block_columns = table.shape[1] // num_blocks
    return {block_name(block): table[columns_of(block, block_columns)] for block in range(num_blocks)}
