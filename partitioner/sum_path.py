"""The way of a running sum over the replicas of a stage, and of the total back to all of them.

A gradient is added up over micro-batches 0, 1, 2, ... whoever has run them, so that no plan changes a bit. The sum
itself travels: from the owner of micro-batch 0 to the owner of the next one that is another's, and so on; each adds its
own in order. Where every replica has neighbouring micro-batches, each link between two of them carries one gradient
there and one total back, and both directions are busy at once. Pure: the workers and the planner read the same tables.

Sums travel while the last backward pass runs (:mod:`edge_node.engine.step_gradients`), and what follows from rows alone
runs while they travel (:mod:`edge_node.engine.frozen_ahead`): :func:`left_over_s` is what a step still waits for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from itertools import groupby, pairwise
from typing import TypeVar

_T = TypeVar("_T", bound=Hashable)

BUSY_S_PER_BYTE = 5.5e-9
"""Seconds of a processor for each byte of a gradient on a worker that takes the sum, adds its own, hands it on, and
does the same with the total: four passes of TLS and gRPC. Measured on a server's core (docs/log.md, 2026-11-23)."""


def runs(owners: Sequence[int]) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """Replicas in the order in which the sum comes to them, each with the micro-batches that it adds.

    Args:
        owners: the replica that has run micro-batch m.
    """
    return tuple(
        (replica, tuple(m for m, _ in run)) for replica, run in groupby(enumerate(owners), key=lambda item: item[1])
    )


def way_back(visited: Sequence[_T], holders: Sequence[_T]) -> tuple[_T, ...]:
    """Everyone in the order in which the total comes to them, from whoever has it first.

    It goes back the way that the sum came, which leaves the other direction of every link to the next sum.

    Args:
        visited: in the order in which the sum came to them, some of them several times.
        holders: all who need the total; those that the sum never came to are the last.
    """
    back = dict.fromkeys(reversed(visited))
    return (*back, *(holder for holder in holders if holder not in back))


def link_uses(owners: Sequence[int], num_replicas: int) -> Counter[tuple[int, int]]:
    """How many gradients go from one replica to another in a step."""
    visited = [replica for replica, _ in runs(owners)]
    return Counter(pairwise(visited)) + Counter(pairwise(way_back(visited, range(num_replicas))))


def sum_factors(owners: Sequence[int], seconds_per_byte: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Seconds for each byte of a gradient, and for each byte of one message on its way from end to end.

    Messages follow one another: what the busiest link carries is the pace, and the last message's way is added.

    Args:
        owners: the replica that has run micro-batch m.
        seconds_per_byte: from any replica to any other.
    """
    uses = link_uses(owners, len(seconds_per_byte))
    if not uses:
        return 0.0, 0.0
    pace = max(count * seconds_per_byte[i][j] for (i, j), count in uses.items())
    way = sum(count * seconds_per_byte[i][j] for (i, j), count in uses.items())
    return pace, way - pace


def left_over_s(link_s: float, beside_s: float, num_bytes: float) -> float:
    """Seconds that a step gets longer by its sums: no work beside them hides what they themselves compute.

    Args:
        link_s: of the sums on their links.
        beside_s: of computing that goes on meanwhile.
        num_bytes: of a gradient.
    """
    return max(link_s - beside_s, BUSY_S_PER_BYTE * num_bytes)
