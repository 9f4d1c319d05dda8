"""Bytes of hidden states in the activation cache, by codec; how they are coded is :mod:`edge_node`'s."""

from __future__ import annotations

from typing import Literal

StateCodec = Literal["raw", "bf16", "int8", "int4"]

INT4_UNIT = 16
"""A token's numbers of int4 are filled up with zeros to a multiple of so many."""
INT4_GROUP_BYTES = 64
"""Bytes that share a scale, at least."""


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
            num_bytes = -(-width // INT4_UNIT) * INT4_UNIT // 2
            # Too few bytes to take a scale in: it stands before them.
            return num_bytes + (1 if num_bytes < INT4_GROUP_BYTES else 0)
