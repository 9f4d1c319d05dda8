"""Tokens of a micro-batch's rows, one row after the other and without padding, as entries of the cache hold them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Shape suffixes: N states, B rows, T padded tokens, V tokens of all rows without padding, D width.


class RowTokens:
    """Which tokens of ``[B, T]`` are kept.

    Args:
        lengths: tokens of each row that are kept, its first ones.
        padded_tokens: T.
        device: where states lie.
    """

    def __init__(self, lengths: Sequence[int], padded_tokens: int, device: torch.device) -> None:
        self.lengths = list(lengths)
        self.padded_tokens = padded_tokens
        is_kept_BT = torch.arange(padded_tokens) < torch.tensor(self.lengths)[:, None]
        self._places_V = is_kept_BT.flatten().nonzero().squeeze(1).to(device)

    @property
    def num_tokens(self) -> int:
        """V."""
        return len(self._places_V)

    def pack(self, states: Sequence[Tensor]) -> Tensor:
        """The kept tokens of N states [B, T, D]: [N * V, D]."""
        packed = [state_BTD.flatten(0, 1).index_select(0, self._places_V) for state_BTD in states]
        return packed[0] if len(packed) == 1 else torch.cat(packed)

    def pad(self, packed: Tensor) -> Tensor:
        """The opposite: [N, B, T, D] of [N * V, D], with zeros where nothing was kept."""
        states_NVD = packed.unflatten(0, (-1, self.num_tokens))
        num_states, num_rows = len(states_NVD), len(self.lengths)
        padded_NTD = packed.new_zeros(num_states, num_rows * self.padded_tokens, packed.shape[1])
        padded_NTD.index_copy_(1, self._places_V, states_NVD)
        padded_NBTD: Tensor = padded_NTD.unflatten(1, (num_rows, self.padded_tokens))
        return padded_NBTD
