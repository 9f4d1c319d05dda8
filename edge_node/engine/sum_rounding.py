"""Rounding of gradient sums to 16 bits, so that half of their bytes travel and whoever holds a sum has the same bits.

A parameter's sum is stored as float16 numbers times one power of two, chosen such that the largest magnitude lies in
[2^14, 2^15) afterwards. Multiplying by a power of two is exact, so what is lost is float16's rounding alone: half of a
unit in its last place, 2^-11 of a number within 2^-28 of the largest, and below that 2^-39 of the largest. A sum that
is rounded already keeps its bits when it is rounded again. Zeros stay zeros; a sum with an infinity or a NaN keeps it,
by the scale 1, so that its step is skipped; so is that of a sum that rounds up to 2^128.

Everybody rounds by the same rule after each addition (:mod:`edge_node.engine.shared_gradients` says which), therefore
no partition changes a bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

_TOP_EXPONENT = 15
"""The largest magnitude of a scaled sum is below two to this."""
_ROUNDS_UP_FROM = 1 - 2.0**-12
"""Share of a power of two from which float16 rounds up to it."""
MAX_EXPONENT = 100
"""Of the scale: the smallest float16 number times its inverse is no subnormal of fp32, which some devices flush."""
_BLOCK_NUMBERS = 1 << 18
"""Numbers that are worked on together: they stay in a core's second cache between one operation and the next."""


def narrow(sums: Sequence[Tensor], narrowed: Sequence[Tensor]) -> list[int]:
    """Round sums to float16; gives the exponent of two by which each was multiplied.

    Args:
        sums: one or more of fp32, none of them empty; they are left multiplied.
        narrowed: of float16 in the same shapes, where the result goes.
    """
    exponents = _exponents(sums)
    torch._foreach_mul_(list(sums), [2.0**exponent for exponent in exponents])
    torch._foreach_copy_(list(narrowed), list(sums))
    return exponents


def widen(narrowed: Sequence[Tensor], exponents: Sequence[int], sums: Sequence[Tensor]) -> None:
    """The fp32 values of what :func:`narrow` gave, into ``sums``."""
    torch._foreach_copy_(list(sums), list(narrowed))
    torch._foreach_mul_(list(sums), [2.0**-exponent for exponent in exponents])


def round_sums(sums: Sequence[Tensor]) -> None:
    """Replace fp32 sums by their values after the rounding."""
    for block in _blocks(sums):
        halves = [torch.empty_like(sum_, dtype=torch.float16) for sum_ in block]
        widen(halves, narrow(block, halves), block)


def _exponents(sums: Sequence[Tensor]) -> list[int]:
    """Exponents of the scales; one wait for a card."""
    extremes = torch.stack([extreme for sum_ in sums for extreme in sum_.aminmax()])
    largest = extremes.reshape(-1, 2).abs().amax(1)
    share, exponents = torch.frexp(largest)
    exponents = _TOP_EXPONENT - exponents - (share >= _ROUNDS_UP_FROM).to(exponents.dtype)
    return torch.where(largest.isfinite(), exponents.clamp(max=MAX_EXPONENT), 0).tolist()


def _blocks(sums: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    block: list[Tensor] = []
    num_numbers = 0
    for sum_ in sums:
        block.append(sum_)
        num_numbers += sum_.numel()
        if num_numbers >= _BLOCK_NUMBERS:
            yield block
            block, num_numbers = [], 0
    if block:
        yield block
