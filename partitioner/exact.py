"""The best cuts of many layouts, with proof: best bound first, and branch and bound over the cuts of each.

Layouts are opened in the order of their bounds (:mod:`partitioner.bounds`) until none is left below the best replay.
The answer is exact unless the allowance of work runs out, which :class:`Proof` tells.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from partitioner.bounds import Bounds
from partitioner.layout import Cuts, Layout
from partitioner.pricing import Candidate, Pricer

TOLERANCE = 1e-9
"""Relative; a plan must beat another by more than rounding."""

_MAX_LAYOUT_WORK = 3_000
"""Share of one layout, so that one whose bound is loose cannot eat the others' allowance."""


@dataclass(frozen=True, slots=True)
class Proof:
    """The best candidate, and how much better any other can be."""

    best: Candidate | None
    best_by_num_stages: dict[int, Candidate]
    """Fastest candidate that was opened for each number of stages."""
    bound_s: float
    """No plan among the layouts costs less."""
    work: int
    """Cuts looked at."""


def prove(pricer: Pricer, layouts: Iterable[Layout], *, limit_s: float = math.inf, allowance: int = 100_000) -> Proof:
    """The cheapest candidate whose cost is below ``limit_s``.

    Args:
        pricer: the job on its fleet.
        layouts: layouts to look at.
        limit_s: what a candidate must beat.
        allowance: cuts to look at. A count and not a clock, so that the same inputs always give the same plan.
    """
    bounds = Bounds(pricer)
    best: Candidate | None = None
    by_num_stages: dict[int, Candidate] = {}
    bounded = sorted((pricer.cost_s(layout, bounds.step_bound_s(layout)), layout) for layout in layouts)
    least_open_s, work = math.inf, 0
    for bound_s, layout in bounded:
        if not bound_s < limit_s * (1 - TOLERANCE):
            break
        if work >= allowance:
            least_open_s = min(least_open_s, bound_s)
            break
        step_limit_s = pricer.step_limit_s(layout, limit_s)
        opened = _Opened(pricer, bounds, layout, step_limit_s, min(_MAX_LAYOUT_WORK, allowance - work))
        work += opened.work
        if not opened.is_settled:
            least_open_s = min(least_open_s, bound_s)
        if opened.best is not None:
            best, limit_s = opened.best, opened.best.cost_s
            by_num_stages[len(layout)] = best
    return Proof(best, by_num_stages, min(limit_s, least_open_s), work)


class _Opened:
    """Branch and bound over the cuts of one layout."""

    def __init__(self, pricer: Pricer, bounds: Bounds, layout: Layout, limit_s: float, allowance: int) -> None:
        self._pricer, self._bounds, self._layout = pricer, bounds, layout
        self._limit_s = limit_s
        self.best: Candidate | None = None
        self.work = 0
        self.is_settled = True
        num_stages = len(layout)
        # Depth first, the most promising branch on top: the first leaf is already near the best.
        branches: list[tuple[float, Cuts]] = [(0.0, (0,))]
        while branches:
            bound_s, cuts = branches.pop()
            if not self._beats_limit(bound_s):
                continue
            if len(cuts) == num_stages + 1:
                self._replay(cuts)
            else:
                children = self._children(cuts)
                self.work += len(children)
                branches += sorted(children, reverse=True)
            if self.work >= allowance and branches:
                self.is_settled = False
                return

    def _beats_limit(self, step_s: float) -> bool:
        return step_s < self._limit_s * (1 - TOLERANCE)

    def _replay(self, cuts: Cuts) -> None:
        self.work += 1
        found = self._pricer.candidate(self._layout, cuts)
        if found is not None and self._beats_limit(found.step_s):
            self.best, self._limit_s = found, found.step_s

    def _children(self, cuts: Cuts) -> list[tuple[float, Cuts]]:
        """Every end that the next stage can have, with the bound of what it leads to."""
        layout, bounds = self._layout, self._bounds
        k = len(cuts) - 1
        rest = bounds.of_suffix(layout, k + 1)
        bound_s, trip_s = rest.step_s, rest.round_trip_s
        # From the stage that is being settled to the first: its ends are a vector, those in front are known.
        ends = np.arange(len(bound_s))
        for j in range(k, -1, -1):
            terms = bounds.terms(layout, j)
            index = (cuts[j], ends if j == k else cuts[j + 1])
            bound_s = bounds.combined_at(terms, index, bound_s, trip_s)
            trip_s = terms.trip_s[index] + trip_s
        found = [(float(bound_s[end]), (*cuts, int(end))) for end in np.flatnonzero(bound_s < self._limit_s)]
        return [child for child in found if self._beats_limit(child[0])]
