"""Which devices form which stage, and how a stage's micro-batches are shared among its replicas.

Entry points: :func:`owners_of`, the table micro-batch -> replica; :func:`windows` and :func:`replica_shares`, which say
what of a step one worker holds at once. They follow the executor's schedule: a stage's forward passes run ahead of its
backward passes by as many micro-batches as workers lie from it to the end.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from partitioner.place import ReplicaShare
from partitioner.sum_path import link_uses

Group = tuple[int, ...]
"""Devices of one stage by their positions in the list of devices, replica 0 first."""

Layout = tuple[Group, ...]
"""All stages, the first one first."""

Cuts = tuple[int, ...]
"""Block borders: stage k holds blocks ``[cuts[k], cuts[k + 1])``; begins with 0 and ends with the number of blocks."""


def owners_of(seconds: Sequence[float], num_micro_batches: int) -> tuple[int, ...]:
    """For every micro-batch the replica that runs it, such that the slowest replica ends as early as possible.

    Each micro-batch goes to the replica that would end first with it. That is optimal: a replica gets its n-th only
    when every other one would end later, so no table with the same counts moved elsewhere has an earlier last end.

    Args:
        seconds: of one micro-batch on each replica.
        num_micro_batches: micro-batches of a step.
    """
    ends = [(cost, replica) for replica, cost in enumerate(seconds)]
    heapq.heapify(ends)
    owners = []
    for _ in range(num_micro_batches):
        end, replica = ends[0]
        owners.append(replica)
        heapq.heapreplace(ends, (end + seconds[replica], replica))
    return tuple(owners)


def ahead_of(layout: Layout, stage_index: int, *, runs_ahead: bool) -> int:
    """Micro-batches by which a stage's forward passes run further ahead than workers lie from it to the end.

    One for each boundary behind it, if at all: in 1F1B a message's way to a neighbour and the answer's way back are
    waited for with every other micro-batch; so they pass while the neighbour runs the micro-batch between.
    """
    return len(layout) - 1 - stage_index if runs_ahead else 0


def windows(layout: Layout, *, runs_ahead: bool = False) -> tuple[int, ...]:
    """For every stage how many micro-batches its forward passes run ahead of its backward passes."""
    found, behind = [], 0
    for k in reversed(range(len(layout))):
        behind += len(layout[k])
        found.append(behind + ahead_of(layout, k, runs_ahead=runs_ahead))
    return tuple(reversed(found))


def most_in_flight(owners: Sequence[int], replica: int, window: int) -> int:
    """Micro-batches that a replica holds between forward and backward pass, at most; steps follow one another."""
    num_micro_batches = len(owners)
    if window >= num_micro_batches:
        return owners.count(replica)
    held = owners[:window].count(replica)
    most = held
    for m in range(window, num_micro_batches):
        held += (owners[m] == replica) - (owners[m - window] == replica)
        most = max(most, held)
    return most


def replica_shares(
    layout: Layout, stage_index: int, owners: Sequence[int], *, runs_ahead: bool = False
) -> tuple[ReplicaShare, ...]:
    """What each replica of a stage has of the step."""
    group, window = layout[stage_index], windows(layout, runs_ahead=runs_ahead)[stage_index]
    num_neighbours = sum(len(layout[k]) for k in (stage_index - 1, stage_index + 1) if 0 <= k < len(layout))
    num_micro_batches = len(owners)
    shares = []
    for replica in range(len(group)):
        in_flight = most_in_flight(owners, replica, window)
        if len(group) == 1:
            shares.append(ReplicaShare(in_flight, int(num_micro_batches > 1), num_neighbours))
            continue
        # Its own micro-batches' gradients, the sum that passes through it, and the total.
        peers = num_neighbours + len({j for pair in link_uses(owners, len(group)) if replica in pair for j in pair}) - 1
        shares.append(ReplicaShare(in_flight, owners.count(replica) + 2, peers))
    return tuple(shares)
