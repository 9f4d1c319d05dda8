"""Which processors who gets: the agents of a benchmark their own, the coordinator others."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

_MANY = 9
_OWN = 2
_TOPOLOGY = Path("/sys/devices/system/cpu")


def physical_first(cores: Sequence[int], topology: Path = _TOPOLOGY) -> list[int]:
    """The processors with one of each physical core first: two threads of one core are not two cores."""
    seen: set[str] = set()
    first: list[int] = []
    second: list[int] = []
    for core in sorted(cores):
        path = topology / f"cpu{core}" / "topology" / "thread_siblings_list"
        siblings = path.read_text().strip() if path.is_file() else str(core)
        (second if siblings in seen else first).append(core)
        seen.add(siblings)
    return [*first, *second]


def apart(cores: Sequence[int]) -> tuple[list[int], list[int]]:
    """Processors for the coordinator and whoever measures, and those for agents; all for both where there are few."""
    ordered = physical_first(cores)
    if len(ordered) < _MANY:
        return ordered, ordered
    return ordered[-_OWN:], ordered[:-_OWN]


def one_after_other(threads: Mapping[str, int], available: Sequence[int]) -> tuple[dict[str, set[int]], bool]:
    """As many processors as threads for each name, and whether there are too few for all to have their own."""
    found: dict[str, set[int]] = {}
    at = 0
    for name, count in threads.items():
        found[name] = {available[(at + i) % len(available)] for i in range(count)}
        at += count
    return found, at > len(available)


def unused(taken: Mapping[str, Collection[int]], available: Sequence[int]) -> list[int]:
    """The processors that nobody got."""
    return sorted(set(available).difference(*taken.values()))


@contextlib.contextmanager
def pinned(cores: Collection[int] | None) -> Iterator[None]:
    """What this thread starts within inherits these processors; None leaves all."""
    if cores is None:
        yield
        return
    # Of this thread alone: a child begins with the mask of the thread that forks it.
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
