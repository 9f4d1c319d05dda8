"""Devices of one host measure at the same time: who is as far as the others, and when all of them go on.

The other side is :mod:`edge_node.meeting`. Nobody is waited for without end: once somebody has reached a milestone the
others have :data:`PATIENCE_S` for it. Who takes longer, or fails, is left behind, and the rest measure on without it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from plutino.types import AgentId

PATIENCE_S = 120.0
"""Devices of one host load and compute the same block; four times what an 8B model's takes on one core."""


@dataclass(slots=True)
class Milestones:
    """Who has reached what: a value with transitions, and no clock."""

    members: frozenset[AgentId]
    """All who were asked."""
    here: set[AgentId] = field(init=False)
    """Those of them who are waited for."""
    reached: dict[AgentId, int] = field(default_factory=dict, init=False)
    """The last milestone that each has reached."""

    def __post_init__(self) -> None:
        self.here = set(self.members)

    @property
    def is_whole(self) -> bool:
        """Nobody was left behind."""
        return self.here == self.members

    def passes(self, milestone: int) -> bool:
        """Whether all who are waited for have reached it; a device without neighbours waits for nobody."""
        return all(self.reached.get(member, -1) >= milestone for member in self.here)

    def behind(self, milestone: int) -> set[AgentId]:
        """Who is waited for and has not reached it."""
        return {member for member in self.here if self.reached.get(member, -1) < milestone}


class HostMeeting:
    """One measurement of several devices. Use it on one event loop.

    Args:
        members: the devices.
        patience_s: from the first to reach a milestone to the last that counts.
    """

    def __init__(self, members: Collection[AgentId], *, patience_s: float = PATIENCE_S) -> None:
        self._milestones = Milestones(frozenset(members))
        self._patience_s = patience_s
        self._waiting: dict[AgentId, tuple[int, Callable[[bool], None]]] = {}
        self._timers: dict[int, asyncio.TimerHandle] = {}
        self.late: set[AgentId] = set()
        """Who took too long."""

    def reach(self, agent_id: AgentId, milestone: int, go_on: Callable[[bool], None]) -> None:
        """A device has reached a milestone; ``go_on`` is called once it may go on, told whether all others came."""
        self._milestones.reached[agent_id] = milestone
        if agent_id not in self._milestones.here:
            go_on(False)
            return
        self._waiting[agent_id] = milestone, go_on
        if milestone not in self._timers:
            loop = asyncio.get_running_loop()
            self._timers[milestone] = loop.call_later(self._patience_s, self._leave_behind, milestone)
        self._let_go_on()

    def leave(self, agent_id: AgentId) -> None:
        """A device is through, or lost: nobody waits for it."""
        self._waiting.pop(agent_id, None)
        self._milestones.here.discard(agent_id)
        self._let_go_on()

    def close(self) -> None:
        """Nobody waits any more."""
        for timer in self._timers.values():
            timer.cancel()

    def _leave_behind(self, milestone: int) -> None:
        late = self._milestones.behind(milestone)
        self.late |= late
        for agent_id in late:
            self.leave(agent_id)

    def _let_go_on(self) -> None:
        for agent_id, (milestone, go_on) in list(self._waiting.items()):
            if self._milestones.passes(milestone):
                del self._waiting[agent_id]
                go_on(self._milestones.is_whole)
