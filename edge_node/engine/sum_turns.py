"""In which order a worker takes, adds to and hands on the sums of several groups of gradients.

Groups of the same holders follow one another on the same way (:class:`Hop`), and every worker has its turns on it in an
order that all work out alike: entry point :func:`turns_of`. Pure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise

from edge_node.methods.base import Role
from edge_node.transport.base import Peer


@dataclass(frozen=True, slots=True)
class Hop:
    """One stop of a sum."""

    owner: Peer
    role: Role
    micro_batches: tuple[int, ...]
    """What the owner adds here; :data:`edge_node.engine.taken_gradients.FOLDED`: what it has added up itself."""
    ends_role: bool
    """The role's sum is whole here, and is added to those of the roles before."""


class TurnKind(IntEnum):
    """What a worker does with one group at one time, in the order in which it does what is due together."""

    ADD = 0
    """Take the sum so far, add its own, hand it on."""
    HAND_ON = 1
    """Give the total of some roles to the owner who ends the next one."""
    SPREAD = 2
    """Take the whole total and hand it on."""


@dataclass(frozen=True, slots=True, order=True)
class Turn:
    """One thing to do. Times are counted so that what is received was sent before.

    A worker takes its turns in order: the earliest of all that are left can always be taken, given room on the links,
    which :func:`turns_of` leaves by starting groups apart.
    """

    time: int
    group: int
    kind: TurnKind
    place: int
    """Which hop, or how far on the way back."""


def turns_of(hops: Sequence[Hop], back: Sequence[Peer], num_groups: int, me: Peer) -> list[Turn]:
    """All that one worker does for groups that take the same way, one group behind the other.

    A group begins when the one before has left the link that carries the most messages of one group. Groups that began
    sooner would fill the links between two workers, and each of them would wait for room on the other's.

    A hop takes two times, one while a message is on its way and one while it is taken and added to. With one time a
    worker would wait for totals that are on their way, and a link of 1 Gbit/s would rest for a third of the time. Where
    a link carries more than two messages of a group it is busy anyway, and with two times a hop could be filled (both
    in docs/log.md, 2026-11-23, "Sums that waited for each other").
    """
    turns: list[Turn] = []
    apart = max(messages_per_link(hops, back).values(), default=1)
    on_the_way = 2 if apart <= 2 else 1
    ends = [place for place, hop in enumerate(hops) if hop.ends_role]
    for group in range(num_groups):
        start = apart * group
        turns += [Turn(start + on_the_way * h, group, TurnKind.ADD, h) for h, hop in enumerate(hops) if hop.owner == me]
        turns += [
            Turn(start + on_the_way * next_end - 1, group, TurnKind.HAND_ON, end)
            for end, next_end in pairwise(ends)
            if hops[end].owner == me
        ]
        turns += [
            Turn(start + on_the_way * (len(hops) - 1 + step), group, TurnKind.SPREAD, step)
            for step, peer in enumerate(back)
            if peer == me
        ]
    return sorted(turns)


def messages_per_link(hops: Sequence[Hop], back: Sequence[Peer]) -> Counter[tuple[Peer, Peer]]:
    """How many messages of one group go from one worker to another."""
    within = [(hop.owner, after.owner) for hop, after in pairwise(hops) if not hop.ends_role]
    ends = [hop.owner for hop in hops if hop.ends_role]
    return Counter(pair for pair in (*within, *pairwise(ends), *pairwise(back)) if pair[0] != pair[1])
