"""The table of position biases that the first block of a T5 half has and its other blocks use; needs torch."""

from __future__ import annotations

import functools
from typing import Any

import torch
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


def lend_table(owner: nn.Module, borrower: nn.Module, table: str) -> None:
    """Let a block make the biases of its scores by another block's table wherever no block before it hands on any.

    Args:
        owner: has the table.
        borrower: a later block of the same half; its parameters stay what they are.
        table: name of the table's tensor in a block.
    """
    attention = _attention_of(borrower, table)
    attention.has_relative_attention_bias = True
    # No submodule, so that the table is not found twice.
    object.__setattr__(attention, "relative_attention_bias", _attention_of(owner, table).relative_attention_bias)


def bias_by_own_table(block: nn.Module, table: str) -> None:
    """Let a block's attention make the biases of its scores itself, whatever the block before it hands on."""

    def without_the_others(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        # With a KV cache the module itself knows where the new tokens stand.
        own = _biases(module, hidden) if kwargs.get("past_key_values") is None else None
        return args, kwargs | {"position_bias": own}

    _attention_of(block, table).register_forward_pre_hook(without_the_others, with_kwargs=True)


def table_shape(block: nn.Module, table: str) -> tuple[int, int]:
    """Buckets and heads of the table that a block has or uses."""
    attention = _attention_of(block, table)
    return int(attention.relative_attention_num_buckets), int(attention.n_heads)


def _biases(attention: Any, hidden_BTD: Tensor) -> Tensor:
    """Biases of all scores among the tokens of a pass, [1, heads, T, T], as the module makes them."""
    kind: Any = type(attention)
    buckets_TT = _buckets(
        kind,
        hidden_BTD.shape[1],
        hidden_BTD.device,
        not attention.is_decoder,
        attention.relative_attention_num_buckets,
        attention.relative_attention_max_distance,
    )
    return attention.relative_attention_bias(buckets_TT).permute(2, 0, 1)[None]  # type: ignore[no-any-return]


@functools.lru_cache(maxsize=32)
def _buckets(
    kind: Any, num_tokens: int, device: torch.device, is_bidirectional: bool, num_buckets: int, max_distance: int
) -> Tensor:
    """Which number of a table stands between two tokens, [T, T]: alike in all blocks, and twenty operations each."""
    # What is made in inference mode could not be used in a training later.
    with torch.inference_mode(False):
        positions_T = torch.arange(num_tokens, device=device)
        found: Tensor = kind._relative_position_bucket(
            positions_T[None, :] - positions_T[:, None],
            bidirectional=is_bidirectional,
            num_buckets=num_buckets,
            max_distance=max_distance,
        )
    return found


def _attention_of(block: nn.Module, table: str) -> Any:
    return block.get_submodule(table.rpartition(".")[0].rpartition(".")[0])
