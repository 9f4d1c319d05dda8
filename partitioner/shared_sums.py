"""Sums of what several stages hold: an embedding that is the head as well, and what all blocks use.

The workers' way is :mod:`edge_node.engine.shared_gradients`'s: from owner to owner of the micro-batches within a use,
from last owner to last owner over the uses in their order, and the total back to all holders.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from itertools import pairwise
from typing import TypeVar

from partitioner.cost import SUM_MESSAGE_BYTES
from partitioner.layout import Layout
from partitioner.link_prices import LinkPrices
from partitioner.sum_path import runs, way_back

_T = TypeVar("_T", bound=Hashable)


def uses_over(stops: Sequence[Sequence[_T]], holders: Sequence[_T]) -> Counter[tuple[_T, _T]]:
    """How many gradients go from one worker to another in a step.

    Args:
        stops: for each use of the parameter in its order, the workers that the sum comes to.
        holders: all who need the total.
    """
    within = [pair for of_use in stops for pair in pairwise(of_use)]
    ends = pairwise([of_use[-1] for of_use in stops])
    back = pairwise(way_back([worker for of_use in stops for worker in of_use], holders))
    return Counter(pair for pair in (*within, *ends, *back) if pair[0] != pair[1])


def shared_sums(pricer: LinkPrices, layout: Layout) -> list[tuple[int, Counter[tuple[int, int]]]]:
    """Bytes of each gradient that several stages share, and how often it goes from one device to another.

    What all blocks use is counted once a stage; with replicas it goes round once a block.
    """
    shape, last = pricer.shape, len(layout) - 1
    if not last:
        return []
    asked = (((0, last), shape.tied_trainable_params), (range(last + 1), shape.stage_trainable_params))
    return [
        (shape.sum_bytes * params, uses_over(_stops(pricer, layout, held_by), [i for k in held_by for i in layout[k]]))
        for held_by, params in asked
        if params
    ]


def shared_sum_s(pricer: LinkPrices, layout: Layout) -> float:
    """Seconds that a step waits for these sums: the last use's gradient is there when all passes are over."""
    seconds = 0.0
    for num_bytes, uses in shared_sums(pricer, layout):
        busy_s = [count / float(pricer.bandwidth[pair]) for pair, count in uses.items()]
        seconds += num_bytes * max(busy_s) + min(SUM_MESSAGE_BYTES, num_bytes) * (sum(busy_s) - max(busy_s))
    return seconds


def _stops(pricer: LinkPrices, layout: Layout, held_by: Iterable[int]) -> list[list[int]]:
    """Devices that the sum comes to in each stage."""
    return [[layout[k][replica] for replica, _ in runs(pricer.sum_owners(layout, k))] for k in held_by]
