"""The TCP sockets of this machine, as the kernel lists them: asked over netlink, as ss does, and without root.

Listening sockets are few and come in a tenth of a millisecond; reading /proc/net/tcp takes fifty times as long, because
it walks the table of all connections. Linux alone.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType

CONNECTED, LISTENING = 1, 10
"""States by the kernel's numbers."""

_SOCK_DIAG = 4
"""Netlink's protocol; linux/netlink.h."""
_BY_FAMILY, _REQUEST_DUMP = 20, 0x301
_ERROR, _DONE = 2, 3
_HEADER = struct.Struct("=IHHII")
_REQUEST = struct.Struct("=BBBBI48x")
"""inet_diag_req_v2 of linux/inet_diag.h: family, protocol, extensions, padding, states; any socket."""
_HEADER_BYTES, _PORT_AT, _ADDRESS_AT, _INODE_AT = 16, 4, 8, 68
"""In inet_diag_msg, from its own begin."""
_V4_IN_V6 = bytes(10) + b"\xff\xff"
_ANSWER_BYTES = 65536
_ANSWER_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TcpSocket:
    """One socket at its local address."""

    host: str
    """IPv4 where a socket of IPv6 is bound to such an address."""
    port: int
    inode: int


class TcpSockets:
    """Asks the kernel; for one thread.

    Raises:
        OSError: the kernel has no socket diagnosis.
    """

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _SOCK_DIAG)
        self._socket.settimeout(_ANSWER_S)

    def __enter__(self) -> TcpSockets:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def of_state(self, state: int) -> list[TcpSocket]:
        """All sockets in this state.

        Raises:
            OSError: the kernel refuses.
        """
        return [one for family in (socket.AF_INET, socket.AF_INET6) for one in self._of_family(family, state)]

    def _of_family(self, family: int, state: int) -> Iterator[TcpSocket]:
        request = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, 0, 1 << state)
        header = _HEADER.pack(_HEADER_BYTES + len(request), _BY_FAMILY, _REQUEST_DUMP, 1, 0)
        self._socket.send(header + request)
        while True:
            answer = self._socket.recv(_ANSWER_BYTES)
            at = 0
            while at < len(answer):
                num_bytes, kind = struct.unpack_from("=IH", answer, at)
                body = answer[at + _HEADER_BYTES : at + num_bytes]
                if kind == _DONE:
                    return
                if kind == _ERROR:
                    code = -struct.unpack_from("=i", body)[0]
                    raise OSError(code, f"the kernel lists no TCP sockets: {os.strerror(code)}")
                yield _socket_of(family, body)
                at += (num_bytes + 3) & ~3


def _socket_of(family: int, body: bytes) -> TcpSocket:
    address = body[_ADDRESS_AT : _ADDRESS_AT + 16]
    if family == socket.AF_INET:
        host = socket.inet_ntop(socket.AF_INET, address[:4])
    elif address.startswith(_V4_IN_V6):
        host = socket.inet_ntop(socket.AF_INET, address[12:])
    else:
        host = socket.inet_ntop(socket.AF_INET6, address)
    (port,) = struct.unpack_from("!H", body, _PORT_AT)
    (inode,) = struct.unpack_from("=I", body, _INODE_AT)
    return TcpSocket(host=host, port=port, inode=inode)


def listing_refusal() -> str | None:
    """Why sockets cannot be listed here; None: they can."""
    try:
        with TcpSockets() as sockets:
            sockets.of_state(LISTENING)
    except (OSError, AttributeError) as error:  # AttributeError: no netlink but on Linux
        return f"TCP sockets cannot be listed here ({error})"
    return None
