"""SecurityService: what people decide about members."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

import grpc.aio

from coordinator.security.records import MemberRecord, TokenRecord
from coordinator.security.warden import Warden
from plutino.errors import ConfigError, PlutinoError, SecurityError
from plutino.security.interceptors import caller_of
from plutino.security.tokens import DEFAULT_TTL_S, LONGEST_TTL_S, MOST_USES
from plutino.wire.status import abort_with_aio
from protos import security_pb2 as pb
from protos import security_pb2_grpc

logger = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]

_NO_TLS = (
    "this coordinator runs with --insecure-loopback: nobody joins it, and agents on this machine need no token; "
    "start it without that option"
)


class SecurityServicer(security_pb2_grpc.SecurityServiceServicer):
    """Parses, calls the warden, maps errors.

    Args:
        warden: None for a coordinator without TLS, which refuses every call with the way out.
        join_addresses: what a token says of where to join.
        on_revoked: told of every device that was cut off, with the reason.
    """

    def __init__(
        self, warden: Warden | None, join_addresses: tuple[str, ...], on_revoked: Callable[[str, str], None]
    ) -> None:
        self._warden = warden
        self._join_addresses = join_addresses
        self._on_revoked = on_revoked

    async def CreateToken(self, request: pb.CreateTokenRequest, context: Context) -> pb.CreateTokenResponse:
        """A token, shown once."""
        try:
            warden = self._present()
            uses, ttl_s = request.uses or 1, request.ttl_s or DEFAULT_TTL_S
            if uses > MOST_USES or not 0 < ttl_s <= LONGEST_TTL_S:
                raise ConfigError(
                    f"a token for {uses} devices and {ttl_s:.0f} s is not allowed; at most {MOST_USES} devices and "
                    f"{LONGEST_TTL_S:.0f} s"
                )
            token, expires_at_s = await asyncio.to_thread(
                warden.make_token, self._join_addresses, uses=uses, ttl_s=ttl_s, actor=_actor(context)
            )
        except PlutinoError as error:
            await abort_with_aio(context, error)
        return pb.CreateTokenResponse(token=token.encode(), token_id=token.token_id, expires_at_s=expires_at_s)

    async def ListTokens(self, request: pb.ListTokensRequest, context: Context) -> pb.ListTokensResponse:
        """All tokens, without their secrets."""
        try:
            tokens = await asyncio.to_thread(self._present().records.tokens)
        except PlutinoError as error:
            await abort_with_aio(context, error)
        return pb.ListTokensResponse(tokens=[_token(record, time.time()) for record in tokens])

    async def RevokeToken(self, request: pb.RevokeTokenRequest, context: Context) -> pb.RevokeTokenResponse:
        """Let nobody join with a token any more."""
        try:
            records = self._present().records
            token_id = find_token(await asyncio.to_thread(records.tokens), request.token_id)
            await asyncio.to_thread(records.revoke_token, token_id, actor=_actor(context))
        except PlutinoError as error:
            await abort_with_aio(context, error)
        return pb.RevokeTokenResponse(token_id=token_id)

    async def RevokeDevice(self, request: pb.RevokeDeviceRequest, context: Context) -> pb.RevokeDeviceResponse:
        """Cut a device off: written first, so that it cannot come back, then its streams end."""
        try:
            warden = self._present()
            member = find_member(await asyncio.to_thread(warden.records.members), request.device)
            actor = _actor(context)
            await asyncio.to_thread(warden.revoke, member.node_id, actor=actor)
        except PlutinoError as error:
            await abort_with_aio(context, error)
        warden.cut(member.node_id)
        self._on_revoked(member.node_id, f"{member.name} was revoked by {actor}")
        return pb.RevokeDeviceResponse(node_id=member.node_id, name=member.name)

    async def Audit(self, request: pb.AuditRequest, context: Context) -> pb.AuditResponse:
        """What happened, oldest first."""
        try:
            rows = await asyncio.to_thread(self._present().records.audit, after=request.after)
        except PlutinoError as error:
            await abort_with_aio(context, error)
        return pb.AuditResponse(
            rows=[
                pb.AuditRow(
                    number=row.number,
                    at_s=row.at_s,
                    event=row.event,
                    actor=row.actor,
                    subject=row.subject,
                    detail=row.detail,
                )
                for row in rows
            ]
        )

    def _present(self) -> Warden:
        if self._warden is None:
            raise SecurityError(_NO_TLS)
        return self._warden


def find_token(tokens: tuple[TokenRecord, ...], text: str) -> str:
    """The token whose id begins so.

    Raises:
        ConfigError: none, or several.
    """
    found = [record.token_id for record in tokens if text and record.token_id.startswith(text)]
    if len(found) != 1:
        raise ConfigError(f"{text!r} fits {len(found)} tokens; see: plutino token list")
    return found[0]


def find_member(members: tuple[MemberRecord, ...], text: str) -> MemberRecord:
    """The device of this name, or whose node id begins so; of those with one name the one that is not revoked.

    Raises:
        ConfigError: none, or several.
    """
    present = [member for member in members if member.revoked_at_s is None]
    found = [member for member in present if member.name == text]
    found = found or [member for member in present if text and member.node_id.startswith(text)]
    if len(found) == 1:
        return found[0]
    if not found:
        known = ", ".join(sorted({member.name for member in present})) or "there are none"
        raise ConfigError(f"no device {text!r} is a member; members: {known}")
    ids = ", ".join(member.node_id for member in found)
    raise ConfigError(f"{text!r} fits {len(found)} devices; name one by its id: {ids}")


def _token(record: TokenRecord, now_s: float) -> pb.Token:
    return pb.Token(
        token_id=record.token_id,
        uses=record.uses,
        uses_left=record.uses_left,
        created_at_s=record.created_at_s,
        expires_at_s=record.expires_at_s,
        state=record.state(now_s),
    )


def _actor(context: Context) -> str:
    caller = caller_of(context.auth_context())
    return "nobody" if caller is None else str(caller)
