"""The transport between worker processes: one persistent gRPC stream per pair, dialled by the lower of the two.

Every pair has a link thread, which sets its stream up (again) and receives from it, and a send thread, which encodes;
both work in the background of whoever computes. The threads that send belong to gRPC: it pulls the frames. Frames that
are refused are counted by their reason; after a corrupted one the stream is given up and what was not acknowledged
comes again over the next one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from typing import TYPE_CHECKING, NamedTuple

import grpc

from edge_node.transport.base import MessageKey, Peer
from edge_node.transport.inbox import Inbox, Message
from edge_node.transport.link import Link, LinkUsage
from edge_node.transport.receiver import refusal_of_origin
from edge_node.transport.streams import AcceptedStream, DialledStream, Stream, data_service, hello_in
from plutino.errors import FrameError, PeerLostError, SecurityError, StaleFrameError, WireError
from plutino.security.identity import COORDINATOR, PeerName, Role
from plutino.security.interceptors import SyncGate, caller_of, nobody_is_revoked
from plutino.security.tls import Credentials
from plutino.types import JobId, Unit
from plutino.wire.channel import Lane, bind, split_address, sync_server
from plutino.wire.frames import AckFrame
from plutino.wire.messages import Bounds, Origin, Refusal, job_hash
from plutino.wire.status import abort_with, error_from_rpc
from plutino.wire.tensors import BufferPool, codec_named

if TYPE_CHECKING:
    from torch import Tensor

MAX_STREAMS = 64
"""Data streams that one worker accepts at a time."""

_FIRST_BACKOFF_S = 0.1
_LONGEST_BACKOFF_S = 1.0
_HELLO_TIMEOUT_S = 5.0
_CLOSE_TIMEOUT_S = 5.0
_MAX_FRUITLESS_STREAMS = 8
"""Streams in a row that moved nothing before a peer counts as lost: it answers, but not in words that we understand."""

logger = logging.getLogger(__name__)


class _Ending(NamedTuple):
    """How a stream ended."""

    was_attached: bool
    """It came up and could carry messages."""
    was_refused: bool
    """It was this side that gave it up, for what the peer sent."""
    reason: str


class _Pairing:
    """A link with its thread and, on the accepting side, the stream that the peer has just dialled."""

    def __init__(self, link: Link, address: str, name: PeerName | None, is_dialler: bool) -> None:
        self.link = link
        self.address = address
        self.name = name
        self.is_dialler = is_dialler
        self.current: Stream | None = None
        self.offered: Stream | None = None
        self.thread: threading.Thread | None = None


class PeerTransport:
    """A worker's end of its data streams; see :class:`edge_node.transport.base.Transport`.

    Listens from construction on; :meth:`close` must be called, or use it as a context manager.

    Args:
        job_id: The job; frames of another one are refused.
        plan_epoch: Generation of the plan; frames of another one are refused.
        own: This worker.
        listen_address: Where the higher of a pair is dialled; port 0 takes a free one.
        bounds: What a peer may make this worker hold; the same on all workers of a plan.
        credentials: This device's; None for plain streams, on loopback only.
        advertised_host: Where peers reach this device; None where the host listened on says it.
        reconnect_s: How long a broken stream may take to come back before the peer is lost.
        on_peer_lost: Called once per lost peer, from a thread of the transport, with the reason.

    Raises:
        ConfigError: the address cannot be listened on.
        SecurityError: the address is not on loopback, and there are no credentials.
    """

    def __init__(
        self,
        job_id: JobId,
        plan_epoch: int,
        own: Peer,
        listen_address: str = "127.0.0.1:0",
        bounds: Bounds | None = None,
        *,
        credentials: Credentials | None = None,
        advertised_host: str | None = None,
        reconnect_s: float = 5.0,
        on_peer_lost: Callable[[Peer, str], None] | None = None,
    ) -> None:
        self._own = own
        self._origin = Origin(job_hash(job_id), plan_epoch, own.stage_index, own.replica_index)
        self._bounds = bounds or Bounds()
        self._credentials = credentials
        self._reconnect_s = reconnect_s
        self._on_peer_lost = on_peer_lost
        self._inbox = Inbox()
        self._pool = BufferPool()
        self._counters = {refusal.value: 0 for refusal in Refusal}
        self._counters_lock = threading.Lock()
        self._changed = threading.Condition()
        self._pairings: dict[Peer, _Pairing] = {}
        self._is_connecting = False
        self._closed = False
        self._num_send_threads = 0
        self._executor = ThreadPoolExecutor(MAX_STREAMS, thread_name_prefix=f"plutino-accept-{own.stage_index}")
        gates = [] if credentials is None else [SyncGate(nobody_is_revoked)]
        self._server = sync_server(Lane.DATA, self._executor, max_concurrent_calls=MAX_STREAMS, interceptors=gates)
        self._server.add_generic_rpc_handlers((data_service(self._exchange),))
        bound_address = bind(self._server, listen_address, credentials)
        bound_host, port = split_address(bound_address)
        self.address = f"{advertised_host or bound_host}:{port}"
        """Where peers dial this worker."""
        self._server.start()

    def __enter__(self) -> PeerTransport:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def counters(self) -> dict[str, int]:
        """Frames refused so far, by reason (the values of :class:`plutino.wire.messages.Refusal`)."""
        with self._counters_lock:
            return dict(self._counters)

    @property
    def usage(self) -> LinkUsage:
        """Bytes and coding seconds of all links together."""
        total = LinkUsage()
        with self._changed:
            usages = [pairing.link.usage for pairing in self._pairings.values()]
        for usage in usages:
            for part in fields(LinkUsage):
                setattr(total, part.name, getattr(total, part.name) + getattr(usage, part.name))
        return total

    def connect(
        self,
        addresses: Mapping[Peer, str],
        *,
        node_ids: Mapping[Peer, str] | None = None,
        timeout_s: float = 30.0,
    ) -> None:
        """Set up the streams to all given peers: dial the higher ones, wait for the lower ones.

        Both sides of a pair must name each other. This worker itself may be among the addresses and is passed over.
        With credentials only the device that the plan names is accepted as a peer: ``node_ids`` must hold all of them.

        Raises:
            PeerLostError: a stream did not come up in time.
            SecurityError: an address is not on loopback without credentials, or with them a peer has no node id.
        """
        deadline_s = time.monotonic() + timeout_s
        names = {peer: self._name_of(peer, node_ids or {}) for peer in addresses}
        with self._changed:
            if self._is_connecting:
                raise RuntimeError("a transport connects once; a new plan takes a new transport")
            for peer, address in addresses.items():
                if peer != self._own:
                    link = Link(self._origin, peer, self._inbox, self._bounds, self._pool, self._count)
                    self._pairings[peer] = _Pairing(
                        link, address, names[peer], is_dialler=_order(self._own) < _order(peer)
                    )
            self._is_connecting = True
            pairings = list(self._pairings.values())
            for pairing in pairings:
                pairing.thread = threading.Thread(
                    target=self._run_link,
                    args=(pairing, deadline_s),
                    name=f"plutino-link-{_label(self._own)}-{_label(pairing.link.peer)}",
                    daemon=True,
                )
                pairing.thread.start()
            self._changed.notify_all()
        for pairing in pairings:
            if not pairing.link.wait_until_up(deadline_s + 1.0):
                reason = pairing.link.lost_reason or f"no data stream within {timeout_s:g} s"
                raise PeerLostError(f"stage {_label(pairing.link.peer)} at {pairing.address} is lost: {reason}")

    def send(self, peer: Peer, key: MessageKey, tensors: dict[str, Tensor], *, codec: str = "raw") -> None:
        """Queue a message; see :meth:`edge_node.transport.base.Transport.send`."""
        self._pairing(peer).link.send(key, tensors, codec_named(codec))

    def receive(self, peer: Peer, key: MessageKey) -> dict[str, Tensor]:
        """Wait for a message; see :meth:`edge_node.transport.base.Transport.receive`."""
        link = self._pairing(peer).link
        message = self._inbox.take(peer, key)
        link.release(message.num_bytes)
        return message.tensors

    def cancel(self, unit: Unit) -> None:
        """Abandon a unit; see :meth:`edge_node.transport.base.Transport.cancel`."""
        self._release(self._inbox.cancel(unit))
        for pairing in self._all_pairings():
            pairing.link.drop_queued(unit)
            pairing.link.flush()

    def finish(self, unit: Unit) -> None:
        """End a unit; see :meth:`edge_node.transport.base.Transport.finish`."""
        self._release(self._inbox.finish(unit))
        for pairing in self._all_pairings():
            pairing.link.flush()

    def close(self) -> None:
        """End all streams and threads; waiting callers get PeerLostError."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
        reason = "this worker closed its transport"
        self._inbox.close(reason)
        for pairing in self._all_pairings():
            pairing.link.lose(reason)
            self._end(pairing, pairing.current)
            self._end(pairing, pairing.offered)
        deadline_s = time.monotonic() + _CLOSE_TIMEOUT_S
        self._server.stop(grace=None).wait(_CLOSE_TIMEOUT_S)
        for pairing in self._all_pairings():
            if pairing.thread is not None:
                pairing.thread.join(max(0.0, deadline_s - time.monotonic()))
        with self._changed:
            ended = self._changed.wait_for(lambda: self._num_send_threads == 0, max(0.0, deadline_s - time.monotonic()))
        if not ended:
            logger.warning(
                "stage %s: %d send threads outlive their transport", _label(self._own), self._num_send_threads
            )
        self._executor.shutdown(wait=ended)

    # A link's thread.

    def _run_link(self, pairing: _Pairing, first_deadline_s: float) -> None:
        link = pairing.link
        deadline_s = first_deadline_s
        backoff_s = _FIRST_BACKOFF_S
        num_fruitless = 0
        reason = "it did not dial"
        while num_fruitless < _MAX_FRUITLESS_STREAMS:
            stream = self._dial(pairing) if pairing.is_dialler else self._wait_offered(pairing, deadline_s)
            if stream is None:
                break
            progress = link.progress
            ending = self._receive_all(pairing, stream)
            reason = ending.reason
            if self._is_closed() or link.lost_reason:
                return
            if ending.was_attached:
                logger.info("stage %s: stream to %s broke: %s", _label(self._own), _label(link.peer), reason)
                deadline_s = time.monotonic() + self._reconnect_s
                backoff_s = _FIRST_BACKOFF_S
            num_fruitless = num_fruitless + 1 if ending.was_refused and link.progress == progress else 0
            if pairing.is_dialler and not self._pause(min(backoff_s, deadline_s - time.monotonic())):
                break
            backoff_s = min(2 * backoff_s, _LONGEST_BACKOFF_S)
        self._lose(pairing, f"{reason}; no stream came up in time")

    def _receive_all(self, pairing: _Pairing, stream: Stream) -> _Ending:
        """Receive until the stream is over."""
        link = pairing.link
        was_attached = False
        try:
            hello = stream.peer_hello()
            self._check_origin(hello.origin, link.peer)
            link.attach(stream.token, hello.ack)
            was_attached = True
            for frame in stream.frames():
                link.accept(frame)
            return _Ending(was_attached, False, "the peer ended the stream")
        except PeerLostError as error:
            self._lose(pairing, str(error))
            return _Ending(was_attached, True, str(error))
        except WireError as error:
            return _Ending(was_attached, True, str(error))
        except grpc.RpcError as error:
            return _Ending(was_attached, False, str(error_from_rpc(error, pairing.address)))
        finally:
            self._end(pairing, stream)

    def _lose(self, pairing: _Pairing, reason: str) -> None:
        link = pairing.link
        if self._is_closed() or link.lost_reason:
            return
        link.lose(reason)
        self._inbox.lose(link.peer, reason)
        logger.warning("stage %s: peer %s is lost: %s", _label(self._own), _label(link.peer), reason)
        if self._on_peer_lost is not None:
            self._on_peer_lost(link.peer, reason)

    def _end(self, pairing: _Pairing, stream: Stream | None) -> None:
        if stream is not None:
            # In this order, or the send thread could end a broken stream as if all were well.
            stream.cancel()
            pairing.link.detach(stream.token)

    def _pause(self, pause_s: float) -> bool:
        """Wait; False if there is nothing left to wait for: time is up or the transport closed."""
        with self._changed:
            return pause_s > 0 and not self._changed.wait_for(lambda: self._closed, pause_s)

    def _outgoing(self, pairing: _Pairing, stream: Stream) -> Iterator[bytes]:
        """Frames of a stream, for the gRPC thread that sends them."""
        threading.current_thread().name = f"plutino-send-{_label(self._own)}-{_label(pairing.link.peer)}"
        with self._changed:
            self._num_send_threads += 1
        try:
            if pairing.link.wait_attached(stream.token, _HELLO_TIMEOUT_S):
                yield from pairing.link.outgoing_frames(stream.token)
            else:
                stream.cancel()
        finally:
            with self._changed:
                self._num_send_threads -= 1
                self._changed.notify_all()

    # The dialling side.

    def _dial(self, pairing: _Pairing) -> Stream | None:
        stream = DialledStream(pairing.address, pairing.link.hello, self._credentials, peer=pairing.name or COORDINATOR)
        with self._changed:
            # Under the lock, so that close() either finds the stream or keeps it from being opened.
            if self._closed:
                stream.cancel()
                return None
            pairing.current = stream
            stream.open(self._outgoing(pairing, stream))
        return stream

    # The accepting side.

    def _exchange(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        try:
            pairing, peer_hello = self._admit(context)
        except (WireError, SecurityError) as error:
            abort_with(context, error)
        stream = AcceptedStream(requests, context, pairing.link.hello, peer_hello)
        with self._changed:
            superseded = (pairing.current, pairing.offered)
            pairing.offered = stream
            self._changed.notify_all()
        # A peer that dials again has given its old stream up, even where this side has not noticed yet.
        for old_stream in superseded:
            self._end(pairing, old_stream)
        yield from self._outgoing(pairing, stream)

    def _admit(self, context: grpc.ServicerContext) -> tuple[_Pairing, AckFrame]:
        hello = hello_in(context.invocation_metadata())
        if hello is None:
            self._count(Refusal.MALFORMED)
            raise FrameError("a data stream must open with an acknowledgement that says who dials")
        dialler = Peer(hello.origin.stage_index, hello.origin.replica_index)
        self._check_origin(hello.origin, dialler)
        with self._changed:
            # The dialler may have heard of this worker before this worker has heard of the dialler.
            self._changed.wait_for(lambda: self._is_connecting or self._closed, _HELLO_TIMEOUT_S)
            pairing = self._pairings.get(dialler)
        if pairing is None or pairing.is_dialler or pairing.link.lost_reason:
            self._count(Refusal.UNKNOWN_SENDER)
            raise StaleFrameError(f"stage {_label(self._own)} expects no stream from stage {_label(dialler)}")
        caller = None if self._credentials is None else caller_of(context.auth_context())
        if caller != pairing.name:
            self._count(Refusal.UNKNOWN_SENDER)
            raise SecurityError(f"stage {_label(dialler)} runs on {pairing.name}; a stream of {caller} is not its")
        return pairing, hello

    def _wait_offered(self, pairing: _Pairing, deadline_s: float) -> Stream | None:
        with self._changed:
            self._changed.wait_for(
                lambda: pairing.offered is not None or self._closed, max(0.0, deadline_s - time.monotonic())
            )
            pairing.current, pairing.offered = pairing.offered, None
            return None if self._closed else pairing.current

    # Small things.

    def _name_of(self, peer: Peer, node_ids: Mapping[Peer, str]) -> PeerName | None:
        if self._credentials is None:
            return None
        if peer not in node_ids:
            raise SecurityError(f"the plan names no device for stage {_label(peer)}; its stream could be anybody's")
        return PeerName(node_ids[peer], Role.NODE)

    def _check_origin(self, origin: Origin, peer: Peer) -> None:
        refusal = refusal_of_origin(origin, self._origin, peer)
        if refusal is not None:
            self._count(refusal)
            raise StaleFrameError(f"{origin} is refused ({refusal.value}): this worker is {self._origin}")

    def _pairing(self, peer: Peer) -> _Pairing:
        with self._changed:
            pairing = self._pairings.get(peer)
        if pairing is None:
            raise PeerLostError(f"stage {_label(peer)} was never connected to stage {_label(self._own)}")
        return pairing

    def _all_pairings(self) -> list[_Pairing]:
        with self._changed:
            return list(self._pairings.values())

    def _release(self, dropped: list[tuple[Peer, Message]]) -> None:
        for peer, message in dropped:
            self._pairing(peer).link.release(message.num_bytes)

    def _count(self, refusal: Refusal) -> None:
        with self._counters_lock:
            self._counters[refusal.value] += 1

    def _is_closed(self) -> bool:
        with self._changed:
            return self._closed


def _order(peer: Peer) -> tuple[int, int]:
    return peer.stage_index, peer.replica_index


def _label(peer: Peer) -> str:
    return f"{peer.stage_index}.{peer.replica_index}"
