"""The two ends of one gRPC data stream, and how a stream opens.

Both ends say hello in their initial metadata: an acknowledgement frame, which names the sender and tells from where to
go on. So a stranger is refused before a thread waits for it, and a dialler knows its credit after one round trip.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import grpc

from edge_node.transport.link import StreamToken
from plutino.errors import FrameError
from plutino.security.identity import COORDINATOR, PeerName
from plutino.security.tls import Credentials
from plutino.wire.channel import Lane, sync_channel
from plutino.wire.frames import AckFrame, decode_header, encode_ack
from plutino.wire.messages import Bounds

_SERVICE = "plutino.v1.DataService"
_METHOD = "Exchange"
_HELLO_KEY = "plutino-hello-bin"

Exchange = Callable[[Iterator[bytes], grpc.ServicerContext], Iterator[bytes]]
"""Handler of an accepted stream: frames in, frames out."""


class Stream(Protocol):
    """What a link's thread does with a stream, whoever dialled it."""

    token: StreamToken

    def peer_hello(self) -> AckFrame:
        """Wait for the peer's hello.

        Raises:
            grpc.RpcError: the stream did not open.
            FrameError: the peer opened it without a readable hello.
        """

    def frames(self) -> Iterator[bytes]:
        """Frames as they come.

        Raises:
            grpc.RpcError: the stream broke.
        """

    def cancel(self) -> None:
        """End the stream at once, from any thread; more than once is fine."""


class DialledStream:
    """The end of the worker that dials; it owns its channel.

    Raises:
        ConfigError: the address is not ``host:port``.
        SecurityError: the address is not on loopback, and there are no credentials.
    """

    def __init__(
        self, address: str, hello: AckFrame, credentials: Credentials | None = None, peer: PeerName = COORDINATOR
    ) -> None:
        self.token = StreamToken(hello.ack)
        self._address = address
        self._hello = hello
        self._channel = sync_channel(address, Lane.DATA, credentials, peer=peer)
        self._call: Any = None

    def open(self, outgoing: Iterator[bytes]) -> None:
        """Dial. A thread of gRPC's pulls ``outgoing`` from now on."""
        # No serialisers: a frame is bytes on both sides.
        exchange: Any = self._channel.stream_stream(f"/{_SERVICE}/{_METHOD}", None, None)
        self._call = exchange(outgoing, metadata=((_HELLO_KEY, encode_ack(self._hello)),))

    def peer_hello(self) -> AckFrame:
        """See :class:`Stream`."""
        hello = hello_in(self._call.initial_metadata())
        if hello is None:
            # A call that failed raises here what became of it.
            next(self._call)
            raise FrameError(f"{self._address} opened a data stream without saying who it is")
        return hello

    def frames(self) -> Iterator[bytes]:
        """See :class:`Stream`."""
        yield from self._call

    def cancel(self) -> None:
        """See :class:`Stream`."""
        self._channel.close()


class AcceptedStream:
    """The end of the worker that was dialled."""

    def __init__(
        self, requests: Iterator[bytes], context: grpc.ServicerContext, hello: AckFrame, peer_hello: AckFrame
    ) -> None:
        self.token = StreamToken(hello.ack)
        self._requests = requests
        self._context = context
        self._peer_hello = peer_hello
        context.send_initial_metadata(((_HELLO_KEY, encode_ack(hello)),))

    def peer_hello(self) -> AckFrame:
        """See :class:`Stream`."""
        return self._peer_hello

    def frames(self) -> Iterator[bytes]:
        """See :class:`Stream`."""
        yield from self._requests

    def cancel(self) -> None:
        """See :class:`Stream`."""
        context: Any = self._context
        context.cancel()


def data_service(exchange: Exchange) -> grpc.GenericRpcHandler[bytes, bytes]:
    """The service that answers :class:`DialledStream`."""
    handler = grpc.stream_stream_rpc_method_handler(exchange)
    return grpc.method_handlers_generic_handler(_SERVICE, {_METHOD: handler})


def hello_in(metadata: Any) -> AckFrame | None:
    """The hello among a call's metadata; None if there is none that can be read."""
    for key, value in metadata or ():
        if key == _HELLO_KEY:
            try:
                frame = decode_header(value, Bounds())
            except FrameError:
                return None
            return frame if isinstance(frame, AckFrame) else None
    return None
