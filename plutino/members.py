"""What a person decides about members, from a program; reached through :attr:`plutino.client.Client.members`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import grpc

from protos import security_pb2 as pb
from protos import security_pb2_grpc

Call = Callable[[Callable[..., Any], Any], Any]
"""Calls a method with a request, and turns what it raises into our errors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewToken:
    """A join token, as only its maker ever sees it."""

    token: str = field(repr=False)
    """The text to copy; a secret."""
    token_id: str
    expires_at_s: float
    """Seconds since 1970, UTC."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSummary:
    """One line about a join token."""

    token_id: str
    state: str
    """usable, used up, expired or revoked."""
    uses: int
    uses_left: int
    created_at_s: float
    expires_at_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEntry:
    """One thing that was done to tokens or members."""

    number: int
    at_s: float
    event: str
    actor: str
    subject: str
    detail: str


class Members:
    """Tokens, revocations and the audit of a coordinator.

    Every method raises SecurityError for a coordinator that runs without TLS.
    """

    def __init__(self, channel: Callable[[], grpc.Channel], call: Call) -> None:
        self._channel = channel
        self._call = call

    def create_token(self, *, uses: int = 1, ttl_s: float = 0.0) -> NewToken:
        """A token for so many devices and seconds; 0 is the coordinator's default of 15 minutes.

        Raises:
            ConfigError: too many, or too long.
        """
        response: pb.CreateTokenResponse = self._call(
            self._stub.CreateToken, pb.CreateTokenRequest(uses=uses, ttl_s=ttl_s)
        )
        return NewToken(token=response.token, token_id=response.token_id, expires_at_s=response.expires_at_s)

    def tokens(self) -> list[TokenSummary]:
        """All tokens ever made, oldest first."""
        response: pb.ListTokensResponse = self._call(self._stub.ListTokens, pb.ListTokensRequest())
        return [
            TokenSummary(
                token_id=token.token_id,
                state=token.state,
                uses=token.uses,
                uses_left=token.uses_left,
                created_at_s=token.created_at_s,
                expires_at_s=token.expires_at_s,
            )
            for token in response.tokens
        ]

    def revoke_token(self, token_id: str) -> str:
        """Let nobody join with a token any more; gives its whole id.

        Raises:
            ConfigError: the beginning of an id fits none, or several.
        """
        response: pb.RevokeTokenResponse = self._call(self._stub.RevokeToken, pb.RevokeTokenRequest(token_id=token_id))
        return response.token_id

    def revoke_device(self, device: str) -> tuple[str, str]:
        """Cut a device off, for good and at once; gives its node id and its name.

        Raises:
            ConfigError: no member has this name or id, or several have.
        """
        response: pb.RevokeDeviceResponse = self._call(self._stub.RevokeDevice, pb.RevokeDeviceRequest(device=device))
        return response.node_id, response.name

    def audit(self, *, after: int = 0) -> list[AuditEntry]:
        """What was done, oldest first: rows with a larger number, at most a thousand."""
        response: pb.AuditResponse = self._call(self._stub.Audit, pb.AuditRequest(after=after))
        return [
            AuditEntry(
                number=row.number,
                at_s=row.at_s,
                event=row.event,
                actor=row.actor,
                subject=row.subject,
                detail=row.detail,
            )
            for row in response.rows
        ]

    @property
    def _stub(self) -> security_pb2_grpc.SecurityServiceStub:
        return security_pb2_grpc.SecurityServiceStub(self._channel())
