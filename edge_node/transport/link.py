"""One pair of workers: what is queued, in flight, acknowledged, received and credited, over any number of streams.

A :class:`Link` outlives its streams. Messages are numbered; the receiver says how far it has them whole and how far the
sender may go, so that a broken stream is followed by sending again exactly what did not arrive, and what one peer can
make the other hold is bounded (:class:`plutino.wire.messages.Bounds`). Knows frames, not gRPC.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edge_node.transport.base import MessageKey, Peer
from edge_node.transport.inbox import Inbox
from edge_node.transport.receiver import Receiver, refusal_of_origin
from plutino.errors import FrameError, PeerLostError
from plutino.wire.frames import (
    CHUNK_BYTES,
    AckFrame,
    ChunkFrame,
    cut,
    decode_header,
    encode_ack,
    encode_frame,
    encode_header,
    num_chunks,
)
from plutino.wire.messages import Ack, Bounds, Codec, MessageHeader, Origin, Refusal, RefusedFrameError, TensorSpec
from plutino.wire.tensors import BufferPool, HostCopy, describe, pack

if TYPE_CHECKING:
    from torch import Tensor

    from plutino.types import Unit

QUEUE_MESSAGES = 2
"""Messages that wait to be sent before :meth:`Link.send` blocks."""


class StreamToken:
    """Stands for one stream of a link; over once it was detached.

    Args:
        hello: The acknowledgement that this side opened the stream with.
    """

    def __init__(self, hello: Ack) -> None:
        self.hello = hello
        self.is_over = False


@dataclass(slots=True)
class LinkUsage:
    """What went over a link so far, sending again included."""

    sent_bytes: int = 0
    received_bytes: int = 0
    encode_s: float = 0.0
    decode_s: float = 0.0


@dataclass(slots=True)
class _Outgoing:
    key: MessageKey
    tensors: HostCopy
    specs: tuple[TensorSpec, ...]
    sequence: int = 0
    """0 until the message is sent for the first time."""


class Link:
    """State of one pair of workers.

    Args:
        own: This worker as it signs its frames.
        peer: The other worker.
        inbox: Where whole messages go.
        bounds: What the peer may make us hold.
        pool: Memory for payloads on their way in.
        count_refusal: Called with the reason of every frame that is not let in.
    """

    def __init__(
        self,
        own: Origin,
        peer: Peer,
        inbox: Inbox,
        bounds: Bounds,
        pool: BufferPool,
        count_refusal: Callable[[Refusal], None],
    ) -> None:
        self.peer = peer
        self.usage = LinkUsage()
        self._own = own
        self._inbox = inbox
        self._bounds = bounds
        self._pool = pool
        self._count_refusal = count_refusal
        # One condition per kind of waiter: a needless wake-up costs 50 us and the interpreter lock.
        self._lock = threading.RLock()
        self._stream_changed = threading.Condition(self._lock)
        self._work_came = threading.Condition(self._lock)
        self._room_came = threading.Condition(self._lock)
        self._stream: StreamToken | None = None
        self._was_up = False
        self._lost_reason = ""
        # As the sender.
        self._queue: deque[_Outgoing] = deque()
        self._in_flight: deque[_Outgoing] = deque()
        self._to_resend: deque[_Outgoing] = deque()
        self._num_sent = 0
        self._peer_ack = Ack(0, 0)
        # As the receiver.
        self._receiver = Receiver(peer, inbox, bounds, pool, count_refusal, self._lock)
        self._announced = Ack(0, 0)
        self._flush = False

    # For the transport's callers.

    def send(self, key: MessageKey, tensors: dict[str, Tensor], codec: Codec) -> None:
        """Queue a message; blocks while the queue is full.

        Raises:
            FrameError: the message cannot travel: its dtypes or its size.
            PeerLostError: the peer is lost.
            UnitCancelledError: the unit was cancelled.
        """
        specs = describe(tensors, codec)
        self._check_size(key, specs)
        tensors_on_host = HostCopy(specs, tensors)
        with self._lock:
            while True:
                self._inbox.check_unit(key.unit)
                if self._lost_reason:
                    raise PeerLostError(self._lost_message())
                if len(self._queue) < QUEUE_MESSAGES:
                    self._queue.append(_Outgoing(key, tensors_on_host, specs))
                    self._wake_send_thread()
                    return
                self._room_came.wait()

    def drop_queued(self, unit: Unit) -> None:
        """Forget queued messages of a cancelled unit and wake whoever waits to queue one."""
        with self._lock:
            self._queue = deque(outgoing for outgoing in self._queue if outgoing.key.unit != unit)
            self._room_came.notify_all()

    def release(self, num_bytes: int) -> None:
        """A received message of this many bytes is held no longer."""
        with self._lock:
            self._receiver.release(num_bytes)
            self._wake_send_thread()

    def flush(self) -> None:
        """Tell the peer now what was received, so that it can let go of its tensors."""
        with self._lock:
            self._flush = True
            self._wake_send_thread()

    # For the transport's threads.

    @property
    def hello(self) -> AckFrame:
        """What this side says first on a stream."""
        with self._lock:
            return AckFrame(self._own, self._receiver.ack)

    @property
    def progress(self) -> tuple[int, int]:
        """Messages received and messages acknowledged; rises while the link does its work."""
        with self._lock:
            return self._receiver.ack.received_through, self._peer_ack.received_through

    @property
    def lost_reason(self) -> str:
        """Why the peer is lost; empty while it is not."""
        with self._lock:
            return self._lost_reason

    @property
    def has_work(self) -> bool:
        """Whether :meth:`outgoing_frames` has a frame to give."""
        with self._lock:
            has_credit = self._num_sent < self._peer_ack.credit_through
            return bool(self._to_resend) or (bool(self._queue) and has_credit) or self._is_ack_due()

    def attach(self, stream: StreamToken, peer_ack: Ack) -> None:
        """Go on over a new stream, from where the peer says it is.

        Raises:
            PeerLostError: the peer has forgotten messages that it had acknowledged.
        """
        with self._lock:
            if peer_ack.received_through < self._peer_ack.received_through:
                raise PeerLostError(
                    f"it had {self._peer_ack.received_through} messages before and says {peer_ack.received_through} "
                    "now: it was started anew within the plan epoch"
                )
            self._apply_ack(peer_ack)
            self._to_resend = deque(self._in_flight)
            self._announced = stream.hello
            self._receiver.forget_partial()
            self._stream = stream
            self._was_up = True
            self._wake_all()

    def detach(self, stream: StreamToken) -> None:
        """The stream is over, attached or not."""
        with self._lock:
            stream.is_over = True
            if self._stream is stream:
                self._stream = None
            self._wake_all()

    def lose(self, reason: str) -> None:
        """Give the peer up; callers of :meth:`send` get PeerLostError from now on."""
        with self._lock:
            self._lost_reason = self._lost_reason or reason
            self._queue.clear()
            self._in_flight.clear()
            self._to_resend.clear()
            self._wake_all()

    def wait_until_up(self, deadline_s: float) -> bool:
        """Wait until a stream was attached once, the peer is lost, or ``time.monotonic()`` passes the deadline."""
        with self._lock:
            self._stream_changed.wait_for(
                lambda: self._was_up or bool(self._lost_reason), max(0.0, deadline_s - time.monotonic())
            )
            return self._was_up and not self._lost_reason

    def wait_attached(self, stream: StreamToken, timeout_s: float) -> bool:
        """Wait until the stream is attached; False if it or the link is over, or time is up."""
        with self._lock:
            self._stream_changed.wait_for(
                lambda: stream.is_over or self._stream is stream or bool(self._lost_reason), timeout_s
            )
            return self._stream is stream

    def outgoing_frames(self, stream: StreamToken) -> Iterator[bytes]:
        """Frames to send over an attached stream, as they are due; ends with the stream. Runs in the send thread."""
        while True:
            with self._lock:
                self._work_came.wait_for(lambda: self._stream is not stream or self.has_work)
                if self._stream is not stream:
                    return
                outgoing = self._next_outgoing()
                ack = self._receiver.ack if outgoing else self._announce()
            if outgoing is None:
                yield encode_ack(AckFrame(self._own, ack))
            else:
                yield from self._frames_of(outgoing, stream)
                # Tensors that the peer acknowledges must not stay alive here while there is nothing to send.
                del outgoing

    def accept(self, frame: bytes) -> None:
        """Take in one frame of the attached stream. Runs in the receive thread.

        Raises:
            RefusedFrameError: the stream cannot go on; after a new one the peer sends again.
        """
        start_s = time.perf_counter()
        # Before the message can be taken: who has it may look at what was received.
        self.usage.received_bytes += len(frame)
        try:
            self._accept(decode_header(frame, self._bounds))
        except RefusedFrameError as error:
            self._count_refusal(error.refusal)
            raise
        finally:
            self.usage.decode_s += time.perf_counter() - start_s

    # Sending.

    def _next_outgoing(self) -> _Outgoing | None:
        if self._to_resend:
            return self._to_resend.popleft()
        if not self._queue or self._num_sent >= self._peer_ack.credit_through:
            return None
        outgoing = self._queue.popleft()
        self._num_sent += 1
        outgoing.sequence = self._num_sent
        self._in_flight.append(outgoing)
        self._room_came.notify_all()
        return outgoing

    def _frames_of(self, outgoing: _Outgoing, stream: StreamToken) -> Iterator[bytes]:
        tensors = outgoing.tensors.wait()
        start_s = time.perf_counter()
        pieces = pack(outgoing.specs, tensors)
        header = MessageHeader(
            origin=self._own,
            kind=outgoing.key.kind,
            unit=outgoing.key.unit,
            micro_batch=outgoing.key.micro_batch,
            position=outgoing.key.position,
            sequence=outgoing.sequence,
            tensors=outgoing.specs,
        )
        encoded_header = encode_header(header)
        total_bytes = header.payload_bytes
        chunks = num_chunks(total_bytes)
        for index in range(chunks):
            offset_bytes = index * CHUNK_BYTES
            payload = cut(pieces, offset_bytes, min(offset_bytes + CHUNK_BYTES, total_bytes))
            with self._lock:
                if self._stream is not stream:
                    return
                ack = self._announce()
            frame = encode_frame(
                encoded_header, ack, index=index, num_chunks=chunks, offset_bytes=offset_bytes, payload=payload
            )
            self.usage.encode_s += time.perf_counter() - start_s
            self.usage.sent_bytes += len(frame)
            yield frame
            start_s = time.perf_counter()

    def _is_ack_due(self) -> bool:
        if self._announced == self._receiver.ack:
            return False
        # Most acknowledgements ride on chunks of the other direction; alone they go only before the peer runs short.
        known_credit = self._announced.credit_through - self._receiver.ack.received_through
        return self._flush or known_credit <= self._bounds.max_inbox_messages // 2

    def _announce(self) -> Ack:
        self._announced = self._receiver.ack
        self._flush = False
        return self._receiver.ack

    def _apply_ack(self, ack: Ack) -> None:
        if ack.received_through > self._num_sent or ack.credit_through < ack.received_through:
            raise RefusedFrameError(
                Refusal.MALFORMED, f"an acknowledgement of {ack} after {self._num_sent} messages were sent"
            )
        received_through = max(ack.received_through, self._peer_ack.received_through)
        self._peer_ack = Ack(received_through, max(ack.credit_through, self._peer_ack.credit_through))
        while self._in_flight and self._in_flight[0].sequence <= received_through:
            self._in_flight.popleft()
        while self._to_resend and self._to_resend[0].sequence <= received_through:
            self._to_resend.popleft()
        self._wake_send_thread()

    # Receiving.

    def _accept(self, frame: ChunkFrame | AckFrame) -> None:
        origin = frame.origin if isinstance(frame, AckFrame) else frame.message.origin
        refusal = refusal_of_origin(origin, self._own, self.peer)
        if refusal is not None:
            # Not a word of our peer of this plan epoch: nothing of it counts, and nothing of the stream is lost.
            self._count_refusal(refusal)
            return
        with self._lock:
            self._apply_ack(frame.ack)
        if isinstance(frame, ChunkFrame) and self._receiver.accept(frame):
            with self._lock:
                self._wake_send_thread()

    def _wake_send_thread(self) -> None:
        if self.has_work:
            self._work_came.notify()

    def _wake_all(self) -> None:
        for condition in (self._stream_changed, self._work_came, self._room_came):
            condition.notify_all()

    def _check_size(self, key: MessageKey, specs: tuple[TensorSpec, ...]) -> None:
        num_bytes = sum(spec.decoded_bytes for spec in specs)
        if num_bytes > self._bounds.max_message_bytes or len(specs) > self._bounds.max_tensors:
            raise FrameError(
                f"{key.kind.name} of {key.unit} has {len(specs)} tensors of {num_bytes} bytes, where "
                f"{self._bounds.max_tensors} of {self._bounds.max_message_bytes} bytes are allowed; "
                "use smaller micro-batches"
            )

    def _lost_message(self) -> str:
        return f"stage {self.peer.stage_index}.{self.peer.replica_index} is lost: {self._lost_reason}"
