"""A long search cut into parts that can run anywhere: the same parts, and so the same plan, wherever they run.

Entry points: :func:`is_long`, :func:`climb_parts`, :func:`run_part`. A part is either a climb, from the starts of a few
numbers of stages, or the improvement of one candidate's cuts. Parts know nothing of each other, and what they found is
merged in their order. Whether a search is long follows from its size and never from a clock or from who is free.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

from partitioner.climb import Guesses, Limits, improve, polish
from partitioner.layout import Layout
from partitioner.pricing import Pricer
from partitioner.values import PlanValue

_LONG_S = 1.0
_SECONDS_PER_BLOCK_AND_DEVICE = 0.75e-3
"""Measured on one core: 0.8 s for 80 blocks and 16 devices, 4 s for 126 blocks and 40 devices, all choices open."""
_NUM_CLIMBS = 2
"""Of one variant."""
_REACH = 3
"""A climb starts from the orders of so many stages more or fewer; from there it may go anywhere."""
_NUM_KEPT = 2
"""Layouts that each round of a climb goes on from; a search that is not cut keeps three in its one climb."""
_NUM_FOUND = 6
MAX_POLISHED = 4
"""Candidates whose cuts are improved, over all variants."""


class SearchPart(PlanValue):
    """One piece of a search."""

    kind: Literal["climb", "polish"]
    variant: int
    """Which choice of micro-batch and codec."""
    layouts: tuple[Layout, ...]
    """Where a climb starts; the one layout whose cuts are to be improved."""
    cuts: tuple[int, ...] = ()
    allow_replicas: bool = False
    """Whether the search that it is of may use replicas."""


class PartResult(PlanValue):
    """What a part found."""

    layouts: tuple[Layout, ...] = ()
    """Of a climb, the best guess first."""
    cuts: tuple[int, ...] = ()
    """Of an improvement."""


Fan = Callable[[Sequence[SearchPart], Callable[[SearchPart], PartResult]], list[PartResult]]
"""Runs parts, here with the function or elsewhere, and gives the results in the parts' order."""


def in_turn(parts: Sequence[SearchPart], run: Callable[[SearchPart], PartResult]) -> list[PartResult]:
    """The fan of one process."""
    return [run(part) for part in parts]


def estimated_s(num_blocks: int, num_devices: int) -> float:
    """About how long a search takes on one core."""
    return _SECONDS_PER_BLOCK_AND_DEVICE * num_blocks * num_devices


def is_long(num_blocks: int, num_devices: int) -> bool:
    """Whether a search is cut into parts."""
    return estimated_s(num_blocks, num_devices) > _LONG_S


def climb_parts(variant: int, guesses: Guesses, seeds: Sequence[Layout], *, allow_replicas: bool) -> list[SearchPart]:
    """Climbs from the most promising numbers of stages, each far enough from the others.

    Args:
        variant: which choice of micro-batch and codec.
        guesses: its guesses, those of the seeds among them.
        seeds: sensible orders of devices, of many lengths.
        allow_replicas: as for the search.
    """
    best_s: dict[int, float] = {}
    for seed in seeds:
        best_s[len(seed)] = min(best_s.get(len(seed), math.inf), guesses.step_s(seed))
    centres: list[int] = []
    for length in sorted(best_s, key=lambda length: (best_s[length], length)):
        if len(centres) < _NUM_CLIMBS and all(abs(length - centre) > _REACH for centre in centres):
            centres.append(length)
    return [
        SearchPart(
            kind="climb",
            variant=variant,
            allow_replicas=allow_replicas,
            layouts=tuple(seed for seed in seeds if abs(len(seed) - centre) <= _REACH),
        )
        for centre in centres
    ]


def run_part(part: SearchPart, pricer: Pricer, limits: Limits) -> PartResult:
    """A part's work; a pure function of its arguments."""
    if part.kind == "polish":
        candidate = pricer.candidate(part.layouts[0], part.cuts)
        assert candidate is not None, "only candidates that fit are improved"
        return PartResult(cuts=polish(pricer, candidate).cuts)
    guesses = Guesses(pricer, limits)
    guesses.add(part.layouts)
    improve(pricer, guesses, limits, num_kept=_NUM_KEPT)
    return PartResult(layouts=tuple(layout for layout, _ in guesses.best(_NUM_FOUND)))
