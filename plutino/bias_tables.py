"""The table of position biases that the first block of a T5 half has and its other blocks use; needs torch."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def put_table(block: nn.Module, table: str, weight: Tensor) -> None:
    """Give a block a table of its own, in place.

    Args:
        block: of an encoder-decoder.
        table: name of the table's tensor in a block.
        weight: [buckets, heads]; the block's parameter lies on its storage.
    """
    attention = _attention_of(block, table)
    attention.has_relative_attention_bias = True
    attention.relative_attention_bias = nn.Embedding.from_pretrained(weight, freeze=False)


def bias_by_own_table(block: nn.Module, table: str) -> None:
    """Let a block's attention make the biases of its scores itself, whatever the block before it hands on."""

    def without_the_others(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, kwargs | {"position_bias": None}

    _attention_of(block, table).register_forward_pre_hook(without_the_others, with_kwargs=True)


def table_shape(block: nn.Module, table: str) -> tuple[int, int]:
    """Buckets and heads of the table that a block has or uses."""
    attention = _attention_of(block, table)
    return int(attention.relative_attention_num_buckets), int(attention.n_heads)


def _attention_of(block: nn.Module, table: str) -> Any:
    return block.get_submodule(table.rpartition(".")[0].rpartition(".")[0])
