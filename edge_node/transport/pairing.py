"""One pair of workers: their link, the thread that keeps a stream to the peer up, and what the pair's stream does.

The lower of the two dials. A stream that breaks is dialled, or waited for, again until the peer counts as lost.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import grpc

from edge_node.transport.base import Peer
from edge_node.transport.inbox import Inbox
from edge_node.transport.link import Link
from edge_node.transport.receiver import refusal_of_origin
from edge_node.transport.streams import AcceptedStream, DialledStream, Stream
from plutino.errors import PeerLostError, StaleFrameError, WireError
from plutino.security.identity import COORDINATOR, PeerName
from plutino.security.tls import Credentials
from plutino.wire.messages import Origin, Refusal
from plutino.wire.status import error_from_rpc

HELLO_TIMEOUT_S = 5.0
_FIRST_BACKOFF_S = 0.1
_LONGEST_BACKOFF_S = 1.0
_MAX_FRUITLESS_STREAMS = 8
"""Streams in a row that moved nothing before a peer counts as lost: it answers, but not in words that we understand."""

logger = logging.getLogger(__name__)


class TransportState:
    """What the pairs of one transport share.

    Args:
        own: this worker.
        origin: what its frames say of where they come from.
        inbox: where what all pairs receive lies.
        credentials: this device's; None for plain streams.
        reconnect_s: how long a broken stream may take to come back before the peer is lost.
        on_peer_lost: called once per lost peer, from its link's thread, with the reason.
    """

    def __init__(
        self,
        own: Peer,
        origin: Origin,
        inbox: Inbox,
        *,
        credentials: Credentials | None,
        reconnect_s: float,
        on_peer_lost: Callable[[Peer, str], None] | None,
    ) -> None:
        self.own = own
        self.origin = origin
        self.inbox = inbox
        self.credentials = credentials
        self.reconnect_s = reconnect_s
        self.on_peer_lost = on_peer_lost
        self.changed = threading.Condition()
        self.closed = False
        self.num_send_threads = 0
        self._counters = {refusal.value: 0 for refusal in Refusal}
        self._counters_lock = threading.Lock()

    @property
    def counters(self) -> dict[str, int]:
        """Frames refused so far, by reason."""
        with self._counters_lock:
            return dict(self._counters)

    def count(self, refusal: Refusal) -> None:
        """Count a refused frame."""
        with self._counters_lock:
            self._counters[refusal.value] += 1

    def check_origin(self, origin: Origin, peer: Peer) -> None:
        """Refuse what another job, another plan or another worker sends.

        Raises:
            StaleFrameError: it is not from ``peer`` in this worker's plan.
        """
        refusal = refusal_of_origin(origin, self.origin, peer)
        if refusal is not None:
            self.count(refusal)
            raise StaleFrameError(f"{origin} is refused ({refusal.value}): this worker is {self.origin}")

    def is_closed(self) -> bool:
        """Whether the transport was closed; takes the lock."""
        with self.changed:
            return self.closed


class _Ending(NamedTuple):
    """How a stream ended."""

    was_attached: bool
    """It came up and could carry messages."""
    was_refused: bool
    """It was this side that gave it up, for what the peer sent."""
    reason: str


class Pairing:
    """A link with its thread and, on the accepting side, the stream that the peer has just dialled.

    Args:
        state: what all pairs of the transport share.
        link: the link to the peer.
        address: where the peer is dialled.
        name: whose certificate the peer must show; None without credentials.
    """

    def __init__(self, state: TransportState, link: Link, address: str, name: PeerName | None) -> None:
        self.link = link
        self.address = address
        self.name = name
        self.is_dialler = _order(state.own) < _order(link.peer)
        self._state = state
        self._current: Stream | None = None
        self._offered: Stream | None = None
        self._thread: threading.Thread | None = None
        self._ends = f"{label(state.own)}-{label(link.peer)}"

    def start(self, first_deadline_s: float) -> None:
        """Start the thread, which gives the peer up where no first stream is up by then (of the monotonic clock)."""
        self._thread = threading.Thread(
            target=self._run, args=(first_deadline_s,), name=f"plutino-link-{self._ends}", daemon=True
        )
        self._thread.start()

    def offer(self, stream: AcceptedStream) -> Iterator[bytes]:
        """Take a stream that the peer has dialled, in place of an older one; gives the frames to send over it."""
        with self._state.changed:
            superseded = (self._current, self._offered)
            self._offered = stream
            self._state.changed.notify_all()
        # A peer that dials again has given its old stream up, even where this side has not noticed yet.
        for old_stream in superseded:
            self._end(old_stream)
        yield from self._outgoing(stream)

    def close(self, reason: str) -> None:
        """Lose the peer and end the streams; the transport must be closed already."""
        self.link.lose(reason)
        self._end(self._current)
        self._end(self._offered)

    def join(self, timeout_s: float) -> None:
        """Wait for the thread."""
        if self._thread is not None:
            self._thread.join(max(0.0, timeout_s))

    def _run(self, first_deadline_s: float) -> None:
        link, state = self.link, self._state
        deadline_s = first_deadline_s
        backoff_s = _FIRST_BACKOFF_S
        num_fruitless = 0
        reason = "it did not dial"
        while num_fruitless < _MAX_FRUITLESS_STREAMS:
            stream = self._dial() if self.is_dialler else self._wait_offered(deadline_s)
            if stream is None:
                break
            progress = link.progress
            ending = self._receive_all(stream)
            reason = ending.reason
            if state.is_closed() or link.lost_reason:
                return
            if ending.was_attached:
                logger.info("stage %s: stream to %s broke: %s", label(state.own), label(link.peer), reason)
                deadline_s = time.monotonic() + state.reconnect_s
                backoff_s = _FIRST_BACKOFF_S
            num_fruitless = num_fruitless + 1 if ending.was_refused and link.progress == progress else 0
            if self.is_dialler and not self._pause(min(backoff_s, deadline_s - time.monotonic())):
                break
            backoff_s = min(2 * backoff_s, _LONGEST_BACKOFF_S)
        self._lose(f"{reason}; no stream came up in time")

    def _receive_all(self, stream: Stream) -> _Ending:
        """Receive until the stream is over."""
        was_attached = False
        try:
            hello = stream.peer_hello()
            self._state.check_origin(hello.origin, self.link.peer)
            self.link.attach(stream.token, hello.ack)
            was_attached = True
            for frame in stream.frames():
                self.link.accept(frame)
            return _Ending(was_attached, False, "the peer ended the stream")
        except PeerLostError as error:
            self._lose(str(error))
            return _Ending(was_attached, True, str(error))
        except WireError as error:
            return _Ending(was_attached, True, str(error))
        except grpc.RpcError as error:
            return _Ending(was_attached, False, str(error_from_rpc(error, self.address)))
        finally:
            self._end(stream)

    def _lose(self, reason: str) -> None:
        link, state = self.link, self._state
        if state.is_closed() or link.lost_reason:
            return
        link.lose(reason)
        state.inbox.lose(link.peer, reason)
        logger.warning("stage %s: peer %s is lost: %s", label(state.own), label(link.peer), reason)
        if state.on_peer_lost is not None:
            state.on_peer_lost(link.peer, reason)

    def _end(self, stream: Stream | None) -> None:
        if stream is not None:
            # In this order, or the send thread could end a broken stream as if all were well.
            stream.cancel()
            self.link.detach(stream.token)

    def _pause(self, pause_s: float) -> bool:
        """Wait; False if there is nothing left to wait for: time is up or the transport closed."""
        with self._state.changed:
            return pause_s > 0 and not self._state.changed.wait_for(lambda: self._state.closed, pause_s)

    def _outgoing(self, stream: Stream) -> Iterator[bytes]:
        """Frames of a stream, for the gRPC thread that sends them."""
        threading.current_thread().name = f"plutino-send-{self._ends}"
        with self._state.changed:
            self._state.num_send_threads += 1
        try:
            if self.link.wait_attached(stream.token, HELLO_TIMEOUT_S):
                yield from self.link.outgoing_frames(stream.token)
            else:
                stream.cancel()
        finally:
            with self._state.changed:
                self._state.num_send_threads -= 1
                self._state.changed.notify_all()

    def _dial(self) -> Stream | None:
        stream = DialledStream(self.address, self.link.hello, self._state.credentials, peer=self.name or COORDINATOR)
        with self._state.changed:
            # Under the lock, so that close() either finds the stream or keeps it from being opened.
            if self._state.closed:
                stream.cancel()
                return None
            self._current = stream
            stream.open(self._outgoing(stream))
        return stream

    def _wait_offered(self, deadline_s: float) -> Stream | None:
        with self._state.changed:
            self._state.changed.wait_for(
                lambda: self._offered is not None or self._state.closed, max(0.0, deadline_s - time.monotonic())
            )
            self._current, self._offered = self._offered, None
            return None if self._state.closed else self._current


def label(peer: Peer) -> str:
    """How messages and threads name a worker."""
    return f"{peer.stage_index}.{peer.replica_index}"


def _order(peer: Peer) -> tuple[int, int]:
    return peer.stage_index, peer.replica_index
