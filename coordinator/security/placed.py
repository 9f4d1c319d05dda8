"""Members that the coordinator itself starts: each start of an agent joins anew, and an agent that ended is shut out.

Their keys lie in folders that end with them, so a member whose agent ended can never come back.
"""

from __future__ import annotations

import asyncio

from coordinator.fleet.registry import FleetRegistry
from coordinator.security.warden import Warden
from plutino.security.identity import COORDINATOR
from plutino.types import AgentId

TOKEN_TTL_S = 120.0
"""An agent joins within seconds of its start."""


class PlacedDevices:
    """Tokens for devices by name, and the end of their membership.

    Args:
        warden: lets them in.
        fleet: hears of their end, before their lease is over.
        addresses: where they join.
    """

    def __init__(self, warden: Warden, fleet: FleetRegistry, addresses: tuple[str, ...]) -> None:
        self._warden = warden
        self._fleet = fleet
        self._addresses = addresses

    async def token(self, name: str) -> str:
        """A join token for one device of this name; earlier members of the name are dismissed."""
        await self.dismiss(name, f"another agent takes the place of {name}")
        token, _ = await asyncio.to_thread(
            self._warden.make_token, self._addresses, uses=1, ttl_s=TOKEN_TTL_S, actor=str(COORDINATOR)
        )
        return token.encode()

    async def dismiss(self, name: str, reason: str) -> None:
        """The devices of this name are gone for good: their jobs recover now, and their certificates count no more."""
        members = await asyncio.to_thread(self._warden.members)
        for member in members:
            if member.name == name and member.revoked_at_s is None:
                await asyncio.to_thread(self._warden.revoke, member.node_id, actor=str(COORDINATOR))
                self._warden.cut(member.node_id)
                self._fleet.revoke(AgentId(member.node_id), reason)
