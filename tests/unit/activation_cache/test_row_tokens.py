"""Tokens of rows without their padding, and back."""

from __future__ import annotations

import torch

from edge_node.activation_cache.row_tokens import RowTokens

LENGTHS = [3, 1, 4]


def states(number):
    values = torch.randn(len(LENGTHS), 5, 8, generator=torch.Generator().manual_seed(number))
    for row, length in enumerate(LENGTHS):
        values[row, length:] = 0
    return values


def test_rows_lie_one_after_the_other_without_padding_state_after_state():
    tokens = RowTokens(LENGTHS, 5, torch.device("cpu"))

    packed = tokens.pack([states(0), states(1)])

    assert tokens.num_tokens == sum(LENGTHS)
    assert torch.equal(packed[:3], states(0)[0, :3])
    assert torch.equal(packed[3:4], states(0)[1, :1])
    assert torch.equal(packed[sum(LENGTHS) :][4:], states(1)[2, :4])


def test_what_was_packed_comes_back_with_zeros_for_padding():
    tokens = RowTokens(LENGTHS, 5, torch.device("cpu"))
    padding = torch.ones(len(LENGTHS), 5, 8)

    padded = tokens.pad(tokens.pack([states(0) + padding * (states(0) == 0), states(1)]))

    assert torch.equal(padded, torch.stack([states(0), states(1)]))


def test_columns_of_wider_bytes_are_padded_too():
    """int4 decodes to a multiple of 16 numbers, of which a state has the first."""
    tokens = RowTokens(LENGTHS, 5, torch.device("cpu"))
    wide = torch.cat([states(0), states(0)], dim=2)

    assert torch.equal(tokens.pad(tokens.pack([wide])[:, :8]), states(0)[None])
