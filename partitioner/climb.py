"""Search of layouts too many to try: start from sensible ones, change one thing at a time, replay the best.

Entry point: :func:`climb`. Starts: all devices, and then one device less at a time, the one without which the guess is
shortest, in three orders. Changes: swap two devices, move one to another place, take an unused one in or in exchange,
leave one out, let two stages become replicas of one or the reverse. Guesses (:mod:`partitioner.estimate`) drive it; the
best guesses are cut exactly to the budgets, replayed, and their cuts improved block by block.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from partitioner.estimate import Estimator, Guess
from partitioner.layout import Cuts, Group, Layout
from partitioner.orders import fastest_first, have_own_cores, with_own_cores
from partitioner.pricing import Candidate, Pricer

_MAX_ROUNDS = 12
_NUM_KEPT = 3
"""Layouts that each round goes on from, each of another number of stages."""
_MAX_NEIGHBOURS = 130
_NUM_RANKED = 8
_NUM_RANKED_OF_FEW = 32
"""Layouts of one length that are remembered; of few devices more, for guesses stray by 30 % where replicas wait."""
_NUM_OPENED_OF_FEW = 8
_NUM_TOP = 2
_FEW_DEVICES = 8
_SHIFTS = (1, 2, 4)
"""Blocks by which a cut is moved while cuts are improved."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Which layouts a job allows."""

    max_stages: int
    exact_stages: int | None
    allow_replicas: bool

    def allow(self, layout: Layout) -> bool:
        """Whether a layout is one of them."""
        if not layout or len(layout) > self.max_stages:
            return False
        if self.exact_stages is not None and len(layout) != self.exact_stages:
            return False
        return self.allow_replicas or all(len(group) == 1 for group in layout)


class Guesses:
    """All guesses made so far for one job on one fleet, the best first.

    Those that seem not to fit are ranked by the blocks that lack, so that a search that starts among them finds out.
    """

    def __init__(self, pricer: Pricer, limits: Limits) -> None:
        self._estimator = Estimator(pricer)
        self._pricer, self._devices = pricer, pricer.devices
        self._limits = limits
        # A layout of few devices has few neighbours: more of them can be opened.
        has_few = len(pricer.devices) <= _FEW_DEVICES
        self._num_top = _NUM_OPENED_OF_FEW if has_few else _NUM_TOP
        self._num_ranked = _NUM_RANKED_OF_FEW if has_few else _NUM_RANKED
        self._found: dict[Layout, Guess] = {}
        self._ranked: dict[int, list[tuple[Layout, Guess]]] = {}
        self._nearest: list[tuple[Layout, Guess]] = []

    def add(self, layouts: Iterable[Layout]) -> None:
        """Guess the layouts that are allowed and new."""
        found = self._found
        new = [layout for layout in dict.fromkeys(layouts) if layout not in found and self._allows(layout)]
        if not new:
            return
        guesses = list(zip(new, self._estimator.guesses(new), strict=True))
        if self._pricer.shape.cached_steps_share:
            guesses = [(one, replace(guess, step_s=self._pricer.cost_s(one, guess.step_s))) for one, guess in guesses]
        found.update(guesses)
        by_length: dict[int, list[tuple[Layout, Guess]]] = {}
        lacking = []
        for item in guesses:
            if item[1].step_s < math.inf:
                by_length.setdefault(len(item[0]), []).append(item)
            else:
                lacking.append(item)
        if not self._ranked and not by_length:
            self._nearest = sorted([*self._nearest, *lacking], key=lambda item: item[1].lacking_blocks)[:_NUM_RANKED]
        for length, items in by_length.items():
            ranked = sorted([*self._ranked.get(length, ()), *items], key=lambda item: item[1].step_s)
            self._ranked[length] = ranked[: self._num_ranked]

    def _allows(self, layout: Layout) -> bool:
        return self._limits.allow(layout) and all(
            len(group) == 1 or have_own_cores(group, self._devices) for group in layout
        )

    def step_s(self, layout: Layout) -> float:
        """The guessed step; infinite for one that was not guessed or seems not to fit."""
        return self._found[layout].step_s if layout in self._found else math.inf

    def best(self, number: int) -> list[tuple[Layout, Guess]]:
        """The shortest guesses, at most 8 of a length or 32 of few devices, of layouts that seem to fit."""
        ranked = [item for items in self._ranked.values() for item in items]
        return sorted(ranked, key=lambda item: item[1].step_s)[:number]

    def next_to_open(self, opened: set[Layout], number: int) -> list[Layout]:
        """The shortest guess that is not opened yet of each length, the best lengths first."""
        if not self._ranked:
            return [layout for layout, _ in self._nearest if layout not in opened][:number]
        found: list[tuple[float, Layout]] = []
        for items in self._ranked.values():
            # A length whose best layouts have all been opened has been climbed to its top.
            fresh = next(((g.step_s, layout) for layout, g in items[: self._num_top] if layout not in opened), None)
            if fresh is not None:
                found.append(fresh)
        found.sort(key=lambda item: item[0])
        return [layout for _, layout in found[:number]]


def starts(pricer: Pricer, guesses: Guesses, limits: Limits) -> list[Layout]:
    """Guess pipelines of every length, each leaving out the devices that help least; gives the good ones."""
    orders = [
        sorted(range(len(pricer.devices)), key=lambda i: (-pricer.room_bytes[i], i)),
        sorted(range(len(pricer.devices)), key=lambda i: (pricer.block_s[i], i)),
        _by_links(pricer),
    ]
    layouts: list[Layout] = list(dict.fromkeys(tuple((i,) for i in order) for order in orders))
    seeds: list[Layout] = list(layouts)
    guesses.add(layouts)
    while len(layouts[0]) > 1:
        shorter = [[layout[:k] + layout[k + 1 :] for k in range(len(layout))] for layout in layouts]
        guesses.add(layout for some in shorter for layout in some)
        following: dict[Layout, None] = {}
        for layout, some in zip(layouts, shorter, strict=True):
            ranked = sorted(range(len(layout)), key=lambda k: (guesses.step_s(some[k]), _room(pricer, layout[k]), k))
            # Of a long pipeline several at a time.
            gone = set(ranked[: max(1, len(layout) // 12)])
            following[tuple(group for k, group in enumerate(layout) if k not in gone)] = None
        layouts = list(following)
        seeds += layouts
    if limits.allow_replicas:
        devices = pricer.devices
        alone = [(fastest_first(with_own_cores([group[0] for group in s], devices), devices),) for s in seeds]
        seeds += dict.fromkeys(alone)
    guesses.add(seeds)
    return seeds


def improve(
    pricer: Pricer, guesses: Guesses, limits: Limits, *, rounds: int = _MAX_ROUNDS, num_kept: int = _NUM_KEPT
) -> None:
    """Change the best layouts one thing at a time as long as a guess gets shorter; pipelines first, then replicas."""
    if limits.allow_replicas:
        improve(pricer, guesses, replace(limits, allow_replicas=False), rounds=rounds, num_kept=num_kept)
        rounds = rounds if len(pricer.devices) <= _FEW_DEVICES else -(-rounds // 3)
    opened: set[Layout] = set()
    for turn in range(rounds):
        fresh = guesses.next_to_open(opened, num_kept)
        if not fresh:
            return
        opened.update(fresh)
        guesses.add(near for layout in fresh for near in neighbours(pricer, layout, limits, turn))


def neighbours(pricer: Pricer, layout: Layout, limits: Limits, turn: int) -> list[Layout]:
    """Layouts that differ from this one in one thing; where there are very many, every n-th from the turn's on."""
    found = list(_neighbours(pricer, layout, limits))
    stride = -(-len(found) // _MAX_NEIGHBOURS)
    return found[turn % stride :: stride] if found else []


def _neighbours(pricer: Pricer, layout: Layout, limits: Limits) -> Iterator[Layout]:
    used = {device for group in layout for device in group}
    unused = [device for device in range(len(pricer.devices)) if device not in used]
    num_stages = len(layout)
    # Of many unused devices the fastest and the roomiest are the ones worth a place.
    unused = sorted(unused, key=lambda i: pricer.block_s[i])[:12]
    for k in range(num_stages):
        yield layout[:k] + layout[k + 1 :]
        for j in range(k + 1, num_stages):
            yield (*layout[:k], layout[j], *layout[k + 1 : j], layout[k], *layout[j + 1 :])
    for device in unused:
        for k in range(num_stages):
            if len(layout[k]) == 1:
                yield (*layout[:k], (device,), *layout[k + 1 :])
        for k in range(num_stages + 1):
            yield (*layout[:k], (device,), *layout[k:])
    for k in range(num_stages):
        rest = layout[:k] + layout[k + 1 :]
        for j in range(len(rest) + 1):
            yield (*rest[:j], layout[k], *rest[j:])
    if limits.allow_replicas:
        yield from _with_replicas(pricer, layout, unused)


def _with_replicas(pricer: Pricer, layout: Layout, unused: Sequence[int]) -> Iterator[Layout]:
    def joined(group: Group, other: Sequence[int]) -> Group:
        return fastest_first((*group, *other), pricer.devices)

    for k, group in enumerate(layout):
        for device in unused:
            yield (*layout[:k], joined(group, (device,)), *layout[k + 1 :])
        for j in range(len(layout)):
            if j != k:
                merged = (*layout[:k], joined(group, layout[j]), *layout[k + 1 :])
                yield merged[:j] + merged[j + 1 :]
        if len(group) == 1:
            continue
        for device in group:
            smaller = tuple(i for i in group if i != device)
            yield (*layout[:k], smaller, *layout[k + 1 :])
            yield (*layout[:k], smaller, (device,), *layout[k + 1 :])
            yield (*layout[:k], (device,), smaller, *layout[k + 1 :])
            for j, other in enumerate(layout):
                if j != k:
                    moved = list(layout)
                    moved[k], moved[j] = smaller, joined(other, (device,))
                    yield tuple(moved)


def settle(pricer: Pricer, guesses: Sequence[tuple[Layout, Guess]]) -> list[Candidate]:
    """The guessed layouts with exact cuts, replayed; those that do not fit are left out."""
    found = []
    for layout, guess in guesses:
        cuts = pricer.clamped(layout, guess.cuts)
        candidate = None if cuts is None else pricer.candidate(layout, cuts)
        if candidate is not None:
            found.append(candidate)
    return found


def polish(pricer: Pricer, candidate: Candidate, *, rounds: int = 12) -> Candidate:
    """Move cuts, and runs of neighbouring cuts, by a few blocks as long as the replay gets shorter."""
    for _ in range(rounds):
        tried = sorted(_shifted(candidate.cuts))
        if not tried:
            return candidate
        seconds = pricer.step_seconds(candidate.layout, tried)
        best = int(seconds.argmin())
        if not seconds[best] < candidate.step_s * (1 - 1e-9):
            return candidate
        found = pricer.candidate(candidate.layout, tried[best])
        assert found is not None, "it was just replayed"
        candidate = found
    return candidate


def _shifted(cuts: Cuts) -> set[Cuts]:
    """Cuts from i to j moved together: blocks pass from one stage to another through those between."""
    found: set[Cuts] = set()
    last = len(cuts) - 1
    for i in range(1, last):
        for j in range(i, last):
            for shift in _SHIFTS if j == i else (1,):
                for way in (-shift, shift):
                    moved = (*cuts[:i], *(cut + way for cut in cuts[i : j + 1]), *cuts[j + 1 :])
                    if moved[i - 1] < moved[i] and moved[j] < moved[j + 1]:
                        found.add(moved)
    return found


def _room(pricer: Pricer, group: Group) -> int:
    """Among devices that cannot be told apart by a guess the one with the least room goes first."""
    return sum(pricer.room_bytes[device] for device in group)


def _by_links(pricer: Pricer) -> list[int]:
    """A chain through the quickest links, from the roomiest device on."""
    cost_s = pricer.busy_s + pricer.latency_s
    left = set(range(len(pricer.devices)))
    here = max(left, key=lambda i: (pricer.room_bytes[i], -i))
    chain = [here]
    left.discard(here)
    while left:
        here = min(left, key=lambda i: (float(cost_s[here, i]), pricer.block_s[i], i))
        chain.append(here)
        left.discard(here)
    return chain
