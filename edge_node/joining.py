"""How a device becomes a member of a coordinator, and stays one.

Joining takes two connections. Over the first, whose certificate nobody can vouch for yet, the device only looks at the
authority that the other side shows, and compares it with the token's. The second is checked against that authority;
only it carries the token's secret, with a request for a certificate whose key was made here and never leaves.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import socket
import ssl
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from plutino.errors import PlutinoError, SecurityError, UnreachableError
from plutino.security.certificates import BACKDATED_S, fingerprint, life, make_request, renewal_due_s
from plutino.security.identity import COORDINATOR, Identity, write_private
from plutino.security.tls import Credentials, Newcomer
from plutino.security.tokens import JoinToken
from plutino.wire.channel import Lane, aio_channel, split_address, sync_channel
from plutino.wire.status import error_from_rpc
from protos import security_pb2 as pb
from protos import security_pb2_grpc

logger = logging.getLogger(__name__)

IDENTITY_FILE = "identity.pem"
MEMBERSHIP_FILE = "membership.json"
_CONNECT_S = 5.0
_JOIN_S = 15.0
_RENEW_S = 10.0
_LONGEST_SLEEP_S = 60.0
_RETRY_SHARE = 0.1
"""Of the life that is left, before a renewal that failed is tried again."""


class _OtherAuthorityError(SecurityError):
    """Somebody else listens at an address."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    """What a device knows of the coordinator it has joined."""

    node_id: str
    devices_address: str
    """Where agents and workers dial, as this device reached it."""
    identity: Path

    @classmethod
    def read(cls, state_dir: Path) -> Membership | None:
        """The membership of a state directory; None if this device has not joined.

        Raises:
            SecurityError: the file is damaged.
        """
        path = state_dir / MEMBERSHIP_FILE
        if not path.exists():
            return None
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return cls(
                node_id=str(values["node_id"]),
                devices_address=str(values["devices_address"]),
                identity=state_dir / IDENTITY_FILE,
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SecurityError(f"{path} is damaged ({error!r}); remove it and join again") from error

    def write(self) -> None:
        """Keep it beside the identity."""
        values = {"node_id": self.node_id, "devices_address": self.devices_address}
        write_private(self.identity.with_name(MEMBERSHIP_FILE), json.dumps(values).encode())

    def check(self, now_s: float) -> None:
        """Whether the certificate still counts.

        Raises:
            SecurityError: it has ended.
        """
        check_life(Identity.read(self.identity).certificate_pem, now_s)


def join(token: JoinToken, name: str, state_dir: Path, clock: Callable[[], float] = time.time) -> Membership:
    """Become a member, at the first of the token's addresses that works; replaces an earlier membership.

    Args:
        token: what a person copied.
        name: what people call this device.
        state_dir: the agent's, which the caller has locked.
        clock: seconds since 1970.

    Raises:
        UnreachableError: no coordinator answers at any of the addresses.
        SecurityError: somebody else than the token's coordinator answers, or it refuses the token.
    """
    failures: list[PlutinoError] = []
    for address in token.addresses:
        try:
            ca_pem = presented_authority(address)
            if not hmac.compare_digest(fingerprint(ca_pem), token.fingerprint):
                raise _OtherAuthorityError(
                    f"{address} is not the coordinator that made this token: it shows another authority. Somebody may "
                    "stand in between, or the token is of another coordinator. Nothing secret was sent"
                )
            return _join_at(address, ca_pem, token, name, state_dir, clock)
        except (UnreachableError, _OtherAuthorityError) as error:
            # Another of the token's addresses may be the right one: one host has many.
            failures.append(error)
    serious = [error for error in failures if isinstance(error, SecurityError)]
    if serious:
        raise serious[0]
    raise UnreachableError("; ".join(str(error) for error in failures))


def presented_authority(address: str) -> bytes:
    """The certificate at the end of the chain that whoever listens at the address shows, as PEM; nothing is checked.

    Raises:
        UnreachableError: nobody answers there with TLS 1.3.
    """
    host, port = split_address(address)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # The look itself must not fail for what it is there to find out.
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    bare_host = host.removeprefix("[").removesuffix("]")
    try:
        with (
            socket.create_connection((bare_host, port), timeout=_CONNECT_S) as connection,
            context.wrap_socket(connection, server_hostname=COORDINATOR.dns) as tls,
        ):
            chain = _chain(tls)
    except (OSError, ssl.SSLError) as error:
        raise UnreachableError(
            f"no coordinator answers at {address} ({error}); check that it runs, that this device reaches it, and "
            "that no firewall closes the port"
        ) from error
    if not chain:
        raise UnreachableError(f"{address} shows no certificate")
    return ssl.DER_cert_to_PEM_cert(chain[-1]).encode()


def check_life(certificate_pem: bytes, now_s: float) -> None:
    """Whether a certificate counts now.

    Raises:
        SecurityError: it has ended.
    """
    _, ends_s = life(certificate_pem)
    if now_s >= ends_s:
        raise SecurityError(
            f"this device's certificate ended {_hours(now_s - ends_s)} ago, because it was not there to renew it; "
            "join again with a new token: plutino token create"
        )


class Renewal:
    """Keeps a member's certificate fresh, at two thirds of its life.

    Args:
        address: where the coordinator takes devices' calls.
        credentials: the device's; their file is replaced.
        clock: seconds since 1970.
    """

    def __init__(self, address: str, credentials: Credentials, clock: Callable[[], float] = time.time) -> None:
        self._address = address
        self._credentials = credentials
        self._clock = clock

    async def run(self) -> None:
        """Renew for ever.

        Raises:
            SecurityError: this device is shut out, or its certificate ended while no coordinator answered.
        """
        while True:
            made_s, ends_s = life(self._credentials.identity().certificate_pem)
            now_s = self._clock()
            wait_s = renewal_due_s(made_s, ends_s) - now_s
            if wait_s > 0:
                # In pieces: the clock of a device that slept has jumped.
                await asyncio.sleep(min(wait_s, _LONGEST_SLEEP_S))
                continue
            try:
                await self._renew()
            except UnreachableError as error:
                check_life(self._credentials.identity().certificate_pem, self._clock())
                logger.warning("the certificate is not renewed yet: %s", error)
                await asyncio.sleep(min(max((ends_s - now_s) * _RETRY_SHARE, 0.1), _LONGEST_SLEEP_S))

    async def _renew(self) -> None:
        key_pem, request_pem = await asyncio.to_thread(make_request)
        channel = aio_channel(self._address, Lane.CONTROL, self._credentials)
        try:
            stub = security_pb2_grpc.CertificateServiceStub(channel)
            response: pb.RenewResponse = await stub.Renew(
                pb.RenewRequest(certificate_request=request_pem), timeout=_RENEW_S
            )
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error, self._address) from error
        finally:
            await channel.close(None)
        identity = Identity(key_pem, response.certificate, self._credentials.identity().ca_pem)
        await asyncio.to_thread(identity.write, self._credentials.path)
        logger.info("this device's certificate is renewed")


def _join_at(
    address: str, ca_pem: bytes, token: JoinToken, name: str, state_dir: Path, clock: Callable[[], float]
) -> Membership:
    key_pem, request_pem = make_request()
    request = pb.JoinRequest(token_id=token.token_id, secret=token.secret, name=name, certificate_request=request_pem)
    with sync_channel(address, Lane.CONTROL, Newcomer(ca_pem)) as channel:
        try:
            response: pb.JoinResponse = security_pb2_grpc.JoinServiceStub(channel).Join(request, timeout=_JOIN_S)
        except grpc.RpcError as error:
            raise error_from_rpc(error, address) from error
    _check_clock(response.certificate, response.now_s, clock())
    host, _ = split_address(address)
    membership = Membership(
        node_id=response.node_id,
        devices_address=f"{host}:{response.devices_port}",
        identity=state_dir / IDENTITY_FILE,
    )
    Identity(key_pem, response.certificate, ca_pem).write(membership.identity)
    membership.write()
    return membership


def _check_clock(certificate_pem: bytes, coordinator_s: float, own_s: float) -> None:
    made_s, ends_s = life(certificate_pem)
    if not made_s - BACKDATED_S <= own_s < ends_s:
        direction = "behind" if own_s < coordinator_s else "ahead of"
        raise SecurityError(
            f"this device's clock is {_hours(abs(own_s - coordinator_s))} {direction} the coordinator's, so its "
            "certificate would not count; set it (timedatectl set-ntp true) and join with a new token"
        )


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds:.0f} s"


def _chain(tls: ssl.SSLSocket) -> list[bytes]:
    """Certificates as the other side sent them, in DER, its own first."""
    if sys.version_info >= (3, 13):
        return list(tls.get_unverified_chain())
    # The same function under its private name, as Python 3.10 to 3.12 have it.
    connection: Any = tls
    encoding = ssl._ssl.ENCODING_DER  # type: ignore[attr-defined]
    return [certificate.public_bytes(encoding) for certificate in connection._sslobj.get_unverified_chain() or ()]
