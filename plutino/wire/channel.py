"""The one place that builds gRPC channels and servers.

Owns the keepalive, the reconnect backoff, the bounds on message sizes and the rule who may be listened to.
Entry points: :func:`sync_channel`, :func:`aio_channel`, :func:`sync_server`, :func:`aio_server` and :func:`bind`.

With :class:`plutino.security.tls.Credentials` a connection is mutual TLS, and whoever dials checks the name of whom it
means. Without them it is plain, and then only loopback addresses are dialled or listened to. Nothing else in the tree
opens a port.
"""

from __future__ import annotations

import ipaddress
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import IntEnum
from typing import Any, Protocol

import grpc
import grpc.aio

from plutino.errors import ConfigError, SecurityError
from plutino.security.identity import COORDINATOR, PeerName
from plutino.security.tls import Credentials, Newcomer

_KIB = 1024
_MIB = 1024 * _KIB

MAX_METADATA_BYTES = 32 * _KIB
"""Bound on the headers or trailers of one call; gRPC's own default of 8 KiB is less than a long error message."""


class Lane(IntEnum):
    """What a connection carries; the value is the bound on one of its messages, in bytes.

    A server has one lane for all its services.
    """

    CONTROL = 256 * _KIB
    """Commands and events between coordinator, agents and workers; the largest are the names of a stage's parameters
    and the tokens of a micro-batch."""
    REPORT = 8 * _MIB
    """Job specs, plans, job details and batches, between the coordinator and people or runners."""
    BULK = _MIB + 64 * _KIB
    """Chunks of weights and shadows of at most 1 MiB, with their protobuf envelope."""
    DATA = 4 * _MIB + 64 * _KIB
    """Chunks of boundary tensors of at most 4 MiB, with their header."""


class _Bindable(Protocol):
    """What sync and aio servers have in common."""

    def add_insecure_port(self, address: str) -> int: ...

    def add_secure_port(self, address: str, server_credentials: grpc.ServerCredentials) -> int: ...


def sync_channel(
    address: str, lane: Lane, credentials: Credentials | Newcomer | None = None, *, peer: PeerName = COORDINATOR
) -> grpc.Channel:
    """Dial ``address`` (``host:port``) for blocking callers; the connection is made by the first call.

    Args:
        address: where the server listens.
        lane: what the connection carries.
        credentials: who dials; None dials in plain, on loopback only.
        peer: who must answer.

    Raises:
        ConfigError: the address is not ``host:port``.
        SecurityError: the address is not on loopback, and there are no credentials.
    """
    target = _target(address, credentials)
    if credentials is None:
        return grpc.insecure_channel(target, options=_channel_options(lane))
    return grpc.secure_channel(target, credentials.for_channel(), options=_secure_options(lane, peer))


def aio_channel(
    address: str, lane: Lane, credentials: Credentials | Newcomer | None = None, *, peer: PeerName = COORDINATOR
) -> grpc.aio.Channel:
    """Dial ``address`` for coroutines of the running event loop; arguments and errors as :func:`sync_channel`."""
    target = _target(address, credentials)
    if credentials is None:
        return grpc.aio.insecure_channel(target, options=_channel_options(lane))
    return grpc.aio.secure_channel(target, credentials.for_channel(), options=_secure_options(lane, peer))


class RenewedChannel:
    """A channel of a caller that lives longer than its certificate. May be shared between threads.

    Args:
        address, lane, credentials, peer: as of :func:`sync_channel`, which tells what is raised.
    """

    def __init__(
        self, address: str, lane: Lane, credentials: Credentials | None = None, *, peer: PeerName = COORDINATOR
    ) -> None:
        self._build: Callable[[], grpc.Channel] = lambda: sync_channel(address, lane, credentials, peer=peer)
        self._credentials = credentials
        self._lock = threading.Lock()
        self._version = 0 if credentials is None else credentials.version
        self._channel = self._build()

    def current(self) -> grpc.Channel:
        """The channel for the next call; another one once the certificate was renewed.

        Calls on the one before go on: it ends with the last of them.
        """
        with self._lock:
            if self._credentials is not None and (version := self._credentials.version) != self._version:
                self._version, self._channel = version, self._build()
            return self._channel

    def close(self) -> None:
        """End the channel; calls in flight fail."""
        self._channel.close()


def sync_server(
    lane: Lane,
    executor: ThreadPoolExecutor,
    *,
    max_concurrent_calls: int | None = None,
    interceptors: Sequence[grpc.ServerInterceptor[Any, Any]] = (),
) -> grpc.Server:
    """Build a server whose calls run in ``executor``; every open stream keeps one of its threads.

    Calls beyond ``max_concurrent_calls`` are refused with RESOURCE_EXHAUSTED; None leaves only the executor as bound,
    and calls beyond its threads wait. A server of credentials needs a gate among its ``interceptors``
    (:mod:`plutino.security.interceptors`): TLS says who calls, the gate who may.
    """
    return grpc.server(
        executor,
        options=_server_options(lane),
        maximum_concurrent_rpcs=max_concurrent_calls,
        interceptors=list(interceptors),
    )


def aio_server(
    lane: Lane,
    *,
    max_concurrent_calls: int | None = None,
    interceptors: Sequence[grpc.aio.ServerInterceptor[Any, Any]] = (),
) -> grpc.aio.Server:
    """Build a server whose calls run as coroutines on the running event loop; otherwise as :func:`sync_server`."""
    return grpc.aio.server(
        options=_server_options(lane),
        maximum_concurrent_rpcs=max_concurrent_calls,
        interceptors=list(interceptors),
    )


def bind(
    server: grpc.Server | grpc.aio.Server,
    address: str,
    credentials: Credentials | None = None,
    *,
    asks_certificate: bool = True,
) -> str:
    """Let a server listen on ``address`` and return where it really listens (port 0 asks for a free port).

    Args:
        server: not started yet.
        address: ``host:port`` of this machine.
        credentials: who listens; None listens in plain, on loopback only.
        asks_certificate: False lets in who has none yet.

    Raises:
        ConfigError: the address is not ``host:port`` or is taken.
        SecurityError: the address is not on loopback, and there are no credentials.
    """
    host, port = split_address(_target(address, credentials))
    bindable: _Bindable = server
    try:
        if credentials is None:
            bound_port = bindable.add_insecure_port(f"{host}:{port}")
        else:
            server_credentials = credentials.for_server(asks_certificate=asks_certificate)
            bound_port = bindable.add_secure_port(f"{host}:{port}", server_credentials)
    except RuntimeError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port}: it is in use or not an address of this machine; "
            "choose another port, or port 0 for any free one"
        ) from error
    return f"{host}:{bound_port}"


def is_loopback(host: str) -> bool:
    """Whether an address stays on this machine."""
    bare_host = host.removeprefix("[").removesuffix("]")
    if bare_host == "localhost":
        return True
    try:
        return ipaddress.ip_address(bare_host).is_loopback
    except ValueError:
        return False


def _target(address: str, credentials: Credentials | Newcomer | None) -> str:
    """The address with its host in numbers where that matters."""
    host, port = split_address(address)
    if host == "localhost":
        # The name may stand for an IPv4 and an IPv6 socket; both ends must mean the same one.
        host = "127.0.0.1"
    if credentials is None and not is_loopback(host):
        raise SecurityError(
            f"{address} is not a loopback address, and this connection would be neither encrypted nor authenticated; "
            "join with a token of the coordinator (plutino token create), or use 127.0.0.1, [::1] or localhost"
        )
    return f"{host}:{port}"


def split_address(address: str) -> tuple[str, int]:
    """Host and port of ``host:port``; an IPv6 host keeps its brackets.

    Raises:
        ConfigError: the address is not ``host:port``.
    """
    host, colon, port_text = address.rpartition(":")
    is_bare_ipv6 = ":" in host and not (host.startswith("[") and host.endswith("]"))
    is_port = port_text.isascii() and port_text.isdigit() and int(port_text) <= 65535
    if not (colon and host and is_port) or is_bare_ipv6:
        raise ConfigError(f"{address!r} is not an address; write host:port, for example 127.0.0.1:7400 or [::1]:7400")
    return host, int(port_text)


def _common_options(lane: Lane) -> list[tuple[str, int]]:
    return [
        ("grpc.max_send_message_length", lane.value),
        ("grpc.max_receive_message_length", lane.value),
        ("grpc.max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
        # Measured: silence is seen after 3.5 s, a blackout of 1.5 s is survived, and 10 Mbit/s links with 5 % loss
        # raise no false alarm. Without keepalive an idle stream never notices that its peer is gone.
        ("grpc.keepalive_time_ms", 2000),
        ("grpc.keepalive_timeout_ms", 2000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]


def _channel_options(lane: Lane) -> list[tuple[str, int]]:
    return [
        *_common_options(lane),
        ("grpc.initial_reconnect_backoff_ms", 100),
        # Despite its name this one bounds a connection attempt, not the pause before it.
        ("grpc.min_reconnect_backoff_ms", 1000),
        ("grpc.max_reconnect_backoff_ms", 1000),
        # A channel owns its connection: two channels to one address neither share a backoff nor each other's queue.
        ("grpc.use_local_subchannel_pool", 1),
        # A proxy of the environment must never see what is meant for this machine.
        ("grpc.enable_http_proxy", 0),
    ]


def _secure_options(lane: Lane, peer: PeerName) -> list[tuple[str, int | str]]:
    return [*_channel_options(lane), ("grpc.ssl_target_name_override", peer.dns)]


def _server_options(lane: Lane) -> list[tuple[str, int]]:
    return [
        *_common_options(lane),
        # Without these two the server ends a client that pings every 2 s with "Too many pings" after about 4 s.
        ("grpc.http2.min_ping_interval_without_data_ms", 200),
        ("grpc.http2.max_ping_strikes", 0),
        # A taken port must be an error, not a second listener that gets half of the connections.
        ("grpc.so_reuseport", 0),
    ]
