"""The transport between worker processes: one persistent gRPC stream per pair, dialled by the lower of the two.

Every pair has a link thread, which sets its stream up (again) and receives from it, and a send thread, which encodes;
both work in the background of whoever computes. The threads that send belong to gRPC: it pulls the frames. Frames that
are refused are counted by their reason; after a corrupted one the stream is given up and what was not acknowledged
comes again over the next one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from typing import TYPE_CHECKING

import grpc

from edge_node.transport.base import MessageKey, Peer
from edge_node.transport.inbox import Inbox, Message
from edge_node.transport.link import Link, LinkUsage
from edge_node.transport.pairing import HELLO_TIMEOUT_S, Pairing, TransportState, label
from edge_node.transport.streams import AcceptedStream, data_service, hello_in
from plutino.errors import FrameError, PeerLostError, SecurityError, StaleFrameError, WireError
from plutino.security.identity import PeerName, Role
from plutino.security.interceptors import SyncGate, caller_of, nobody_is_revoked
from plutino.security.tls import Credentials
from plutino.types import JobId, Unit
from plutino.wire.channel import Lane, bind, split_address, sync_server
from plutino.wire.frames import AckFrame
from plutino.wire.messages import Bounds, Origin, Refusal, job_hash
from plutino.wire.status import abort_with
from plutino.wire.tensors import BufferPool, codec_named

if TYPE_CHECKING:
    from torch import Tensor

MAX_STREAMS = 64
"""Data streams that one worker accepts at a time."""

_CLOSE_TIMEOUT_S = 5.0

logger = logging.getLogger(__name__)


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
        is_for_card: A card computes here: messages lie in page-locked memory, from which it takes copies by itself.
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
        is_for_card: bool = False,
        reconnect_s: float = 5.0,
        on_peer_lost: Callable[[Peer, str], None] | None = None,
    ) -> None:
        self._bounds = bounds or Bounds()
        self._inbox = Inbox()
        self._pool = BufferPool(is_page_locked=is_for_card)
        self._state = TransportState(
            own,
            Origin(job_hash(job_id), plan_epoch, own.stage_index, own.replica_index),
            self._inbox,
            credentials=credentials,
            reconnect_s=reconnect_s,
            on_peer_lost=on_peer_lost,
        )
        self._pairings: dict[Peer, Pairing] = {}
        self._is_connecting = False
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
        return self._state.counters

    @property
    def usage(self) -> LinkUsage:
        """Bytes and coding seconds of all links together."""
        total = LinkUsage()
        with self._state.changed:
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
        with self._state.changed:
            if self._is_connecting:
                raise RuntimeError("a transport connects once; a new plan takes a new transport")
            for peer, address in addresses.items():
                if peer != self._state.own:
                    link = Link(self._state.origin, peer, self._inbox, self._bounds, self._pool, self._state.count)
                    self._pairings[peer] = Pairing(self._state, link, address, names[peer])
            self._is_connecting = True
            pairings = list(self._pairings.values())
            for pairing in pairings:
                pairing.start(deadline_s)
            self._state.changed.notify_all()
        for pairing in pairings:
            if not pairing.link.wait_until_up(deadline_s + 1.0):
                reason = pairing.link.lost_reason or f"no data stream within {timeout_s:g} s"
                raise PeerLostError(f"stage {label(pairing.link.peer)} at {pairing.address} is lost: {reason}")

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
        with self._state.changed:
            if self._state.closed:
                return
            self._state.closed = True
            self._state.changed.notify_all()
        reason = "this worker closed its transport"
        self._inbox.close(reason)
        for pairing in self._all_pairings():
            pairing.close(reason)
        deadline_s = time.monotonic() + _CLOSE_TIMEOUT_S
        self._server.stop(grace=None).wait(_CLOSE_TIMEOUT_S)
        for pairing in self._all_pairings():
            pairing.join(deadline_s - time.monotonic())
        with self._state.changed:
            ended = self._state.changed.wait_for(
                lambda: self._state.num_send_threads == 0, max(0.0, deadline_s - time.monotonic())
            )
        if not ended:
            logger.warning(
                "stage %s: %d send threads outlive their transport",
                label(self._state.own),
                self._state.num_send_threads,
            )
        self._executor.shutdown(wait=ended)

    # The accepting side.

    def _exchange(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        try:
            pairing, peer_hello = self._admit(context)
        except (WireError, SecurityError) as error:
            abort_with(context, error)
        yield from pairing.offer(AcceptedStream(requests, context, pairing.link.hello, peer_hello))

    def _admit(self, context: grpc.ServicerContext) -> tuple[Pairing, AckFrame]:
        hello = hello_in(context.invocation_metadata())
        if hello is None:
            self._state.count(Refusal.MALFORMED)
            raise FrameError("a data stream must open with an acknowledgement that says who dials")
        dialler = Peer(hello.origin.stage_index, hello.origin.replica_index)
        self._state.check_origin(hello.origin, dialler)
        with self._state.changed:
            # The dialler may have heard of this worker before this worker has heard of the dialler.
            self._state.changed.wait_for(lambda: self._is_connecting or self._state.closed, HELLO_TIMEOUT_S)
            pairing = self._pairings.get(dialler)
        if pairing is None or pairing.is_dialler or pairing.link.lost_reason:
            self._state.count(Refusal.UNKNOWN_SENDER)
            raise StaleFrameError(f"stage {label(self._state.own)} expects no stream from stage {label(dialler)}")
        caller = None if self._state.credentials is None else caller_of(context.auth_context())
        if caller != pairing.name:
            self._state.count(Refusal.UNKNOWN_SENDER)
            raise SecurityError(f"stage {label(dialler)} runs on {pairing.name}; a stream of {caller} is not its")
        return pairing, hello

    # Small things.

    def _name_of(self, peer: Peer, node_ids: Mapping[Peer, str]) -> PeerName | None:
        if self._state.credentials is None:
            return None
        if peer not in node_ids:
            raise SecurityError(f"the plan names no device for stage {label(peer)}; its stream could be anybody's")
        return PeerName(node_ids[peer], Role.NODE)

    def _pairing(self, peer: Peer) -> Pairing:
        with self._state.changed:
            pairing = self._pairings.get(peer)
        if pairing is None:
            raise PeerLostError(f"stage {label(peer)} was never connected to stage {label(self._state.own)}")
        return pairing

    def _all_pairings(self) -> list[Pairing]:
        with self._state.changed:
            return list(self._pairings.values())

    def _release(self, dropped: list[tuple[Peer, Message]]) -> None:
        for peer, message in dropped:
            self._pairing(peer).link.release(message.num_bytes)
