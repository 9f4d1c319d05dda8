"""The coordinator's side of trust: its authority, its own certificates and their renewal, its gates.

Folder ``security`` of the state folder, for its owner alone::

    authority.pem      the authority's key and certificate; whoever has it can make members
    coordinator.pem    identity of the coordinator and its bulk process, renewed while it runs
    person.pem         identity of this user's command line
    runner.pem         identity of jobs' runners
    security.sqlite    tokens, members, revocations, audit
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path

from coordinator.security.records import MemberRecord, SecurityRecords
from plutino.security.certificates import LIFETIME_S, Authority, life, renewal_due_s
from plutino.security.identity import COORDINATOR, PeerName, Role
from plutino.security.interceptors import AioGate, IsRevoked
from plutino.security.tls import Credentials
from plutino.security.tokens import JoinToken

logger = logging.getLogger(__name__)

SECURITY_DIR = "security"
_PERSON = PeerName("owner", Role.PERSON)
_RUNNER = PeerName("runner", Role.RUNNER)


class Warden:
    """Opens the folder, making what is missing; close it.

    Args:
        state_dir: the coordinator's.
        lifetime_s: of every certificate that is issued.
        clock: seconds since 1970.

    Raises:
        SecurityError: the authority is damaged, or other users may read it.
        StoreError: the records are damaged.
    """

    def __init__(
        self, state_dir: Path, *, lifetime_s: float = LIFETIME_S, clock: Callable[[], float] = time.time
    ) -> None:
        folder = state_dir / SECURITY_DIR
        self.authority = Authority.open(folder / "authority.pem", clock)
        self.records = SecurityRecords(folder, clock)
        self.lifetime_s = lifetime_s
        self.person_path = folder / "person.pem"
        self.runner_path = folder / "runner.pem"
        self.coordinator_path = folder / "coordinator.pem"
        self._clock = clock
        self._own = ((COORDINATOR, self.coordinator_path), (_PERSON, self.person_path), (_RUNNER, self.runner_path))
        self._issue_own()
        self.credentials = Credentials(self.coordinator_path)
        # This process alone writes the records, so its gates need not read them, which may wait for a sync.
        self._present = {member.node_id for member in self.records.members() if member.revoked_at_s is None}
        self._gates: list[AioGate] = []

    def close(self) -> None:
        """Let the records go."""
        self.records.close()

    def admit(self, token_id: str, secret: bytes, *, node_id: str, name: str) -> None:
        """Use a token up for one device; raises as :meth:`SecurityRecords.admit`."""
        self.records.admit(token_id, secret, node_id=node_id, name=name)
        self._present.add(node_id)

    def revoke(self, node_id: str, *, actor: str) -> None:
        """Shut a device out for good; its calls still go on until :meth:`cut`."""
        self.records.revoke_member(node_id, actor=actor)
        self._present.discard(node_id)

    def members(self) -> tuple[MemberRecord, ...]:
        """All devices that ever joined."""
        return self.records.members()

    def revoked_ids(self) -> set[str]:
        """Devices that were revoked and may still hold a certificate that has not ended."""
        oldest_s = self._clock() - self.lifetime_s
        return {m.node_id for m in self.members() if m.revoked_at_s is not None and m.renewed_at_s > oldest_s}

    def gate(self) -> AioGate:
        """A gate for one more server."""
        gate = AioGate(lambda caller: caller.role is Role.NODE and caller.name not in self._present)
        self._gates.append(gate)
        return gate

    def cut(self, node_id: str) -> None:
        """End all calls of a revoked device; the bulk process looks for itself."""
        num_cut = sum(gate.cut(PeerName(node_id, Role.NODE)) for gate in self._gates)
        logger.info("%d streams of revoked device %s were cut", num_cut, node_id)

    def make_token(self, addresses: tuple[str, ...], *, uses: int, ttl_s: float, actor: str) -> tuple[JoinToken, float]:
        """A join token and when it expires."""
        record, secret = self.records.create_token(uses=uses, ttl_s=ttl_s, actor=actor)
        return JoinToken(addresses, self.authority.fingerprint, record.token_id, secret), record.expires_at_s

    async def renew_forever(self) -> None:
        """Renew the coordinator's own certificates at two thirds of their life."""
        while True:
            made_s, ends_s = life(self.credentials.identity().certificate_pem)
            # In pieces: the clock of a machine that slept has jumped.
            wait_s = renewal_due_s(made_s, ends_s) - self._clock()
            if wait_s > 0:
                await asyncio.sleep(min(wait_s, 60.0))
            else:
                self._issue_own()
                logger.info("the coordinator's certificates are renewed")

    def _issue_own(self) -> None:
        for name, path in self._own:
            self.authority.identity(name, self.lifetime_s).write(path)


def revocations(records: SecurityRecords) -> IsRevoked:
    """A gate's question, asked of the records: only devices are ever revoked, and unknown ones are none of ours."""

    def is_revoked(caller: PeerName) -> bool:
        return caller.role is Role.NODE and not records.is_member(caller.name)

    return is_revoked
