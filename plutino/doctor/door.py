"""Whether one machine reaches another, tried as workers will do it: a gRPC server, and a dial.

A door gives away that it is open, and takes bursts of meaningless bytes (:mod:`plutino.doctor.burst`) from devices; it
refuses every other call. Entry points: :class:`Door`, :func:`knock`.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

import grpc

from plutino.doctor.burst import burst_service
from plutino.errors import UnreachableError
from plutino.security.identity import COORDINATOR, PeerName
from plutino.security.interceptors import IsRevoked, SyncGate, nobody_is_revoked
from plutino.security.tls import Credentials
from plutino.wire.channel import Lane, bind, split_address, sync_channel, sync_server

KNOCK_TIMEOUT_S = 3.0
DOOR_S = 10.0
"""Longest time that a door is open."""
_MAX_CALLS = 16
_NOTHING = "/plutino.v1.DoctorService/Nothing"
_NOBODY = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED})


class Door:
    """Listens until it is closed."""

    def __init__(
        self,
        host: str = "127.0.0.1",
        credentials: Credentials | None = None,
        *,
        advertised_host: str | None = None,
        is_revoked: IsRevoked = nobody_is_revoked,
    ) -> None:
        """Listen on a free port of ``host``.

        Args:
            host: an address of this machine.
            credentials: this device's; None for a plain door, on loopback only.
            advertised_host: where others dial; None where the host listened on says it.
            is_revoked: whether a member that sends a burst has been shut out.

        Raises:
            ConfigError: the host is not an address of this machine.
            SecurityError: it is beyond loopback, and there are no credentials.
        """
        # The coordinator lets one device at a time measure; a second thread is for one that goes on after its time.
        self._executor = ThreadPoolExecutor(2, thread_name_prefix="door")
        gates = [] if credentials is None else [SyncGate(is_revoked)]
        self._server = sync_server(Lane.DATA, self._executor, max_concurrent_calls=_MAX_CALLS, interceptors=gates)
        self._server.add_generic_rpc_handlers((burst_service(),))
        bound_host, port = split_address(bind(self._server, f"{host}:0", credentials))
        self.address = f"{advertised_host or bound_host}:{port}"
        self._server.start()

    def close(self) -> None:
        """Stop listening."""
        self._server.stop(0).wait(KNOCK_TIMEOUT_S)
        self._executor.shutdown(wait=False)

    def __enter__(self) -> Door:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def knock(
    address: str,
    *,
    credentials: Credentials | None = None,
    peer: PeerName = COORDINATOR,
    timeout_s: float = KNOCK_TIMEOUT_S,
    lane: Lane = Lane.DATA,
) -> float:
    """Call a server for something it cannot have, and hang up; seconds until it said so.

    Args:
        address: where it listens.
        credentials: who knocks; None knocks in plain, on loopback only.
        peer: who must answer.
        timeout_s: nobody answers after so long.
        lane: what workers would use the connection for.

    A call rather than a connection: with TLS 1.3 a client thinks that it is connected before the server has looked at
    its certificate.

    Raises:
        ConfigError: the address is malformed.
        SecurityError: it is beyond loopback, and there are no credentials.
        UnreachableError: nobody answered in time.
    """
    started_s = time.perf_counter()
    channel = sync_channel(address, lane, credentials, peer=peer)
    try:
        channel.unary_unary(_NOTHING, bytes, bytes)(b"", timeout=timeout_s)
    except grpc.RpcError as error:
        if isinstance(error, grpc.Call) and error.code() not in _NOBODY:
            return time.perf_counter() - started_s
        raise UnreachableError(
            f"{address} did not answer within {timeout_s:g} s; is a firewall between, or nobody listening there?"
        ) from None
    finally:
        channel.close()
    return time.perf_counter() - started_s
