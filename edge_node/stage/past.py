"""Keys and values that stand before every row in the attention of a stage's blocks: virtual tokens without queries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

# Shape suffixes: B rows, K key heads, P virtual tokens, H head size.

KeyValue = tuple[Tensor, Tensor]
"""Keys and values of one block, [K, P, H] each."""


class Past(Protocol):
    """What a method puts before every row of a stage."""

    @property
    def num_tokens(self) -> int:
        """Virtual tokens; 0 while the method is switched off."""

    def key_values(self) -> Sequence[KeyValue]:
        """Keys and values of the stage's own blocks, in order, fp32; autograd follows them to what is trained."""


class FixedPast(Cache):
    """A KV cache for training: rows see what it holds, and nothing is added to it.

    Blocks may therefore run any number of times with it, as recomputation does.
    """

    def __init__(self, key_values: Sequence[KeyValue]) -> None:
        """``key_values`` are [B, K, P, H], a pair for each block."""
        super().__init__(layers=[_FixedLayer(keys, values) for keys, values in key_values])


class _FixedLayer(DynamicLayer):
    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._past = keys, values
        # transformers reads the length of the past here.
        self.keys, self.values = keys, values
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> KeyValue:
        """What a row's tokens attend to; nothing is kept."""
        keys, values = self._past
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)


def for_rows(past: Past, num_rows: int, dtype: torch.dtype) -> list[KeyValue]:
    """Keys and values [B, K, P, H] in the compute dtype; without a copy a row."""

    def of_rows(tensor: Tensor) -> Tensor:
        return tensor.to(dtype).expand(num_rows, -1, -1, -1)

    return [(of_rows(keys), of_rows(values)) for keys, values in past.key_values()]
