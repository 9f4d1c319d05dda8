"""How peft stores the keys and values of deep prompts: one tensor for all blocks, cut here into one a block.

peft's PREFIX_TUNING has a single tensor ``prompt_embeddings`` of [virtual tokens, 2 x blocks x width]: for each block
its keys, then its values, with width = key heads x head size. A stage holds the columns of its own blocks, under
``prompt_embeddings.<block>``. What else is trained (a score head) stands beside it, one prefix shorter than where peft
wraps the model's layers. Works on numpy arrays; :func:`columns_of` on tensors too.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
from numpy.typing import NDArray

Float32Array = NDArray[np.float32]

CHECKPOINT_KEY = "prompt_embeddings"
_WRAPPED = "base_model.model."
"""Before a layer's name where peft replaces layers, as LoRA does; plutino's names have it everywhere."""
_BARE = "base_model."
"""Before it where peft leaves the model as it is, as deep prompts do."""


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
    """The checkpoint of all blocks' parts, and of what else is trained."""
    others = {bare_name(name): part for name, part in parts.items() if not is_block(name)}
    num_blocks = len(parts) - len(others)
    table = np.concatenate([parts[block_name(block)] for block in range(num_blocks)], axis=1)
    return {CHECKPOINT_KEY: table, **others}


def split_blocks(checkpoint: Mapping[str, Float32Array], names: Collection[str]) -> dict[str, Float32Array]:
    """The named parts of a checkpoint, those of all blocks among them; the reverse of :func:`join_blocks`."""
    table = checkpoint[CHECKPOINT_KEY]
    num_blocks = sum(map(is_block, names))
    block_columns = table.shape[1] // num_blocks
    parts = {block_name(block): table[columns_of(block, block_columns)] for block in range(num_blocks)}
    return parts | {name: checkpoint[bare_name(name)] for name in names if not is_block(name)}


def is_block(name: str) -> bool:
    """Whether a global name is that of a block's keys and values."""
    return name.startswith(f"{CHECKPOINT_KEY}.")


def bare_name(name: str) -> str:
    """What peft calls a parameter that plutino has under this name, where it leaves the model as it is."""
    return _BARE + name.removeprefix(_WRAPPED)
