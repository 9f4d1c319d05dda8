"""Which rows of a step go through the model together: a cut by rows, or by tokens.

Pure functions of their arguments. A pipeline's stages take micro-batches one after the other, so that what counts is
how many tokens all of them have, padding included: rows sorted by length and cut into equal numbers of them have
nearly the fewest. Replicas that have the whole model take one each and wait for the one with the most: of 16 rows of
MRPC the longest four have 323 tokens, where four micro-batches of like tokens have 280 each at the most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_FEW_LABELS = 16
"""Their logits, and what the loss holds beside them, take 6 MiB of a vocabulary of 32,000 words."""


@dataclass(frozen=True, slots=True)
class CutRow:
    """A row as the cut sees it."""

    index: int
    """Its position in the data set."""
    num_tokens: int
    num_labels: int = 0
    """Label tokens, whose logits are computed; a cut by rows does not ask for them."""


def cut_by_rows(rows: Sequence[CutRow], size: int) -> tuple[tuple[int, ...], ...]:
    """Micro-batches of ``size`` rows, the longest first; the last may have fewer.

    Equal lengths stay in the order of their positions, so the cut depends on which rows there are, not on their order.
    """
    order = [row.index for row in _longest_first(rows)]
    return tuple(tuple(order[first : first + size]) for first in range(0, len(order), size))


def cut_by_tokens(rows: Sequence[CutRow], size: int) -> tuple[tuple[int, ...], ...]:
    """As many micro-batches as :func:`cut_by_rows` gives, the longest rows first, the largest as small as can be.

    The size of one is its rows times its longest row. None is larger than ``size`` of the longest row, which is what
    devices' memory was planned for; nor does one have more than twice as many rows, or room for more label tokens than
    ``size`` of the row with the most have together with :func:`spare_labels`.
    """
    order = _longest_first(rows)
    number = -(-len(order) // size)
    most_labels = size * max((row.num_labels for row in order), default=0)
    limits = _Limits(2 * size, most_labels + spare_labels(most_labels))
    low, high = (order[0].num_tokens, size * order[0].num_tokens) if order else (0, 0)
    while low < high:
        middle = (low + high) // 2
        if len(_filled(order, middle, limits)) <= number:
            high = middle
        else:
            low = middle + 1
    cut = _filled(order, high, limits)
    while len(cut) < number:
        # Fewer than planned would leave a worker without any: the largest that has several rows is halved.
        largest = max((at for at in range(len(cut)) if len(cut[at]) > 1), key=lambda at: (_tokens(cut[at]), -at))
        half = -(-len(cut[largest]) // 2)
        cut[largest : largest + 1] = [cut[largest][:half], cut[largest][half:]]
    return tuple(tuple(row.index for row in group) for group in cut)


def spare_labels(num_labels: int) -> int:
    """Label tokens for which memory is planned beside those of a micro-batch by rows: as many again, but only a few.

    Where rows have a class or a short answer each, more of them share a micro-batch than by rows.
    """
    return min(num_labels, _FEW_LABELS)


@dataclass(frozen=True, slots=True)
class _Limits:
    num_rows: int
    num_labels: int


def _longest_first(rows: Sequence[CutRow]) -> list[CutRow]:
    return sorted(rows, key=lambda row: (-row.num_tokens, row.index))


def _filled(order: Sequence[CutRow], most_tokens: int, limits: _Limits) -> list[list[CutRow]]:
    """The rows in their order, each micro-batch filled before the next one begins: no other cut has fewer of them."""
    cut: list[list[CutRow]] = []
    for row in order:
        group = [*cut[-1], row] if cut else []
        if group and (
            len(group) <= limits.num_rows and _tokens(group) <= most_tokens and _labels(group) <= limits.num_labels
        ):
            cut[-1] = group
        else:
            cut.append([row])
    return cut


def _tokens(group: Sequence[CutRow]) -> int:
    return len(group) * group[0].num_tokens


def _labels(group: Sequence[CutRow]) -> int:
    return len(group) * max(row.num_labels for row in group)
