"""How alike two texts are: ROUGE-L (Lin 2004), the F1 of their longest common subsequence of words. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

_WORD = re.compile(r"[^\W_]+")


def words(text: str) -> list[str]:
    """Runs of letters and digits, in lower case."""
    return _WORD.findall(text.lower())


def rouge_l(first: Sequence[str], second: Sequence[str]) -> float:
    """F1 of the longest common subsequence; 1.0 where both are empty."""
    if not first or not second:
        return float(len(first) == len(second))
    return 2 * _common_subsequence(first, second) / (len(first) + len(second))


class KnownTexts:
    """Texts that new ones are compared with."""

    def __init__(self) -> None:
        self._texts: list[tuple[list[str], Counter[str]]] = []

    def add(self, text: str) -> None:
        """Know one more."""
        own = words(text)
        self._texts.append((own, Counter(own)))

    def has_alike(self, text: str, above: float) -> bool:
        """Whether a known text has a ROUGE-L F1 above this, or the very same words."""
        own = words(text)
        counts = Counter(own)
        for known, known_counts in self._texts:
            if own == known:
                return True
            # No subsequence is longer than what both have at all: few pairs need the exact answer.
            bound = 2 * (counts & known_counts).total() / max(1, len(own) + len(known))
            if bound > above and rouge_l(own, known) > above:
                return True
        return False


def _common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence, all of ``first`` at once as the bits of a number (Hyyro 2004)."""
    places: dict[str, int] = {}
    for place, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << place
    full = (1 << len(first)) - 1
    open_places = full
    for word in second:
        match = open_places & places.get(word, 0)
        open_places = ((open_places + match) | (open_places - match)) & full
    return len(first) - open_places.bit_count()
