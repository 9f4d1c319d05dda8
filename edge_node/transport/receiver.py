"""The receiving half of a link: puts chunks together, and says how far it is and how far the peer may go."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edge_node.transport.base import MessageKey, MessageKind, Peer
from edge_node.transport.inbox import Arrival, Inbox, Message
from plutino.wire.frames import ChunkFrame
from plutino.wire.messages import Ack, Bounds, MessageHeader, Origin, Refusal, RefusedFrameError
from plutino.wire.tensors import BufferPool, unpack

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(slots=True)
class _Assembly:
    """A message of which some chunks have come."""

    header: MessageHeader
    key: MessageKey
    memory: Tensor | None
    """Where the payload goes; None if the message is not wanted."""
    view: NDArray[np.uint8] | None
    """The same for writing."""
    next_chunk: int = 0
    received_bytes: int = 0


class Receiver:
    """Takes a peer's chunks in, each message once and in the order of their numbers.

    Args:
        peer: Who sends.
        inbox: Where whole messages go.
        bounds: What the peer may make us hold.
        pool: Memory for payloads.
        count_refusal: Called with the reason of every message that is not let in.
        lock: Guards :attr:`ack` and what is held; the link's.
    """

    def __init__(
        self,
        peer: Peer,
        inbox: Inbox,
        bounds: Bounds,
        pool: BufferPool,
        count_refusal: Callable[[Refusal], None],
        lock: threading.RLock,
    ) -> None:
        self.ack = Ack(0, 0)
        """What the peer may know; rises with what comes and with what is taken."""
        self._peer = peer
        self._inbox = inbox
        self._bounds = bounds
        self._pool = pool
        self._count_refusal = count_refusal
        self._lock = lock
        self._assembly: _Assembly | None = None
        self._held_messages = 0
        self._held_bytes = 0
        self._grant()

    def accept(self, chunk: ChunkFrame) -> bool:
        """Take in one chunk of the peer's; True if it completed a message.

        Raises:
            RefusedFrameError: the chunk does not follow the ones before, or was not asked for.
        """
        sequence = chunk.message.sequence
        if sequence <= self.ack.received_through:
            self._count_refusal(Refusal.DUPLICATE)
            return False
        if sequence > self.ack.credit_through:
            raise RefusedFrameError(
                Refusal.UNCREDITED, f"message {sequence} came where only {self.ack.credit_through} were asked for"
            )
        assembly = self._assembly or self._begin(chunk.message)
        is_next = assembly.next_chunk == chunk.index and assembly.received_bytes == chunk.offset_bytes
        if assembly.header != chunk.message or not is_next:
            raise RefusedFrameError(Refusal.MALFORMED, f"chunk {chunk.index} of message {sequence} came out of turn")
        start = assembly.received_bytes
        assembly.next_chunk += 1
        assembly.received_bytes += len(chunk.payload)
        if assembly.view is not None:
            # By numpy, which copies without the interpreter lock: who computes needs it for every kernel.
            assembly.view[start : assembly.received_bytes] = np.frombuffer(chunk.payload, np.uint8)
        if assembly.next_chunk < chunk.num_chunks:
            return False
        self._assembly = None
        self._complete(assembly)
        return True

    def release(self, num_bytes: int) -> None:
        """A message of this many bytes is held no longer; the peer may send more."""
        with self._lock:
            self._held_messages -= 1
            self._held_bytes -= num_bytes
            self._grant()

    def forget_partial(self) -> None:
        """A new stream begins, over which a message that came in part comes again whole."""
        self._assembly = None

    def _begin(self, header: MessageHeader) -> _Assembly:
        if header.sequence != self.ack.received_through + 1:
            raise RefusedFrameError(
                Refusal.MALFORMED, f"message {header.sequence} came after message {self.ack.received_through}"
            )
        try:
            kind = MessageKind(header.kind)
        except ValueError as error:
            raise RefusedFrameError(Refusal.MALFORMED, f"no message is of kind {header.kind}") from error
        key = MessageKey(kind, header.unit, header.micro_batch, header.position)
        is_wanted = not self._inbox.is_over(header.unit)
        memory = self._pool.lend(header.payload_bytes) if is_wanted else None
        self._assembly = _Assembly(header, key, memory, None if memory is None else memory.numpy())
        return self._assembly

    def _complete(self, assembly: _Assembly) -> None:
        header = assembly.header
        num_bytes = header.decoded_bytes
        arrival = Arrival.STALE_UNIT
        with self._lock:
            self._held_messages += 1
            self._held_bytes += num_bytes
        if assembly.memory is not None:
            message = Message(unpack(header.tensors, assembly.memory), num_bytes)
            arrival = self._inbox.put(self._peer, assembly.key, message)
        if arrival is not Arrival.STORED:
            self._count_refusal(Refusal(arrival.value))
            self.release(num_bytes)
        with self._lock:
            # Only now: an acknowledged message is one that its consumer can take.
            self.ack = Ack(header.sequence, self.ack.credit_through)
            self._grant()

    def _grant(self) -> None:
        """Raise the credit as far as the bounds allow, counting each message on its way at the largest size."""
        bounds = self._bounds
        credit_through = self.ack.credit_through
        while True:
            num_coming = credit_through - self.ack.received_through + 1
            if num_coming + self._held_messages > bounds.max_inbox_messages:
                break
            if num_coming * bounds.max_message_bytes + self._held_bytes > bounds.max_inbox_bytes:
                break
            credit_through += 1
        self.ack = Ack(self.ack.received_through, credit_through)


def refusal_of_origin(origin: Origin, own: Origin, peer: Peer) -> Refusal | None:
    """Why ``own`` does not listen to ``origin`` in the place of ``peer``; None if it does."""
    if origin.job_hash != own.job_hash:
        return Refusal.STALE_JOB
    if origin.plan_epoch != own.plan_epoch:
        return Refusal.STALE_EPOCH
    if (origin.stage_index, origin.replica_index) != (peer.stage_index, peer.replica_index):
        return Refusal.UNKNOWN_SENDER
    return None
