"""Bytes of hidden states in the activation cache, by codec; how they are coded is :mod:`edge_node`'s."""

from __future__ import annotations

from typing import Literal

StateCodec = Literal["raw", "bf16", "int8", "int4"]

INT4_WORD = 16
"""Numbers of int4 that share a word of 8 bytes."""
INT4_GROUP_WORDS = 8
"""Words that share a scale, at least: the topmost bit of each is one of the scale's."""


def token_bytes(codec: StateCodec, width: int, dtype_bytes: int) -> int:
    """Bytes of one token's hidden state of ``width`` numbers, which the backbone computes in ``dtype_bytes`` each."""
    match codec:
        case "raw":
            return width * dtype_bytes
        case "bf16":
            return 2 * width
        case "int8":
            return width + 4
        case "int4":
            num_words = -(-width // INT4_WORD)
            # Fewer words than a scale has bits: it stands before them.
            return 8 * num_words + (1 if num_words < INT4_GROUP_WORDS else 0)
