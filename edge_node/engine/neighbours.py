"""Who talks with whom: the pairs of workers between which a plan ever sends anything. Pure."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from edge_node.transport.base import Peer
from plutino.job.assignment import StageShape


def partners(
    stages: Sequence[StageShape], sums: Collection[Peer], me: Peer, entry_owners: Collection[Peer] = ()
) -> frozenset[Peer]:
    """The workers with which one has a stream; whoever is among a worker's partners has it among its own.

    Neighbouring stages exchange micro-batches, sums of shared parameters' gradients go from holder to holder,
    tokens go from the last stage's first replica straight to the first stage's, and entries of the activation cache
    from every worker to whoever keeps them.

    Args:
        stages: all stages of the plan.
        sums: see :func:`edge_node.engine.shared_gradients.sum_partners`.
        me: the worker.
        entry_owners: workers that keep entries which others compute.
    """
    found: set[Peer] = set()
    # Longer units wrap around their tables, each at its own length.
    period = math.lcm(*(max(1, len(stage.micro_batch_owner)) for stage in stages))
    for neighbour in (me.stage_index - 1, me.stage_index + 1):
        if 0 <= neighbour < len(stages):
            found |= {
                Peer(neighbour, stages[neighbour].replica_of(m))
                for m in range(period)
                if stages[me.stage_index].replica_of(m) == me.replica_index
            }
            if me.replica_index == 0:
                found.add(Peer(neighbour))  # the first replicas generate
    if me == Peer(0):
        found.add(Peer(len(stages) - 1))
    if me == Peer(len(stages) - 1):
        found.add(Peer(0))
    found |= set(sums)
    found |= set(entry_owners)
    if me in entry_owners:
        found |= {Peer(stage, replica) for stage, shape in enumerate(stages) for replica in range(shape.num_replicas)}
    return frozenset(found - {me})
