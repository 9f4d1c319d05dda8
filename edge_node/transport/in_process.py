"""A transport between stages that are threads of one process: for the oracle and for tests."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from edge_node.transport.base import MessageKey, Peer
from edge_node.transport.inbox import Inbox, Message
from plutino.errors import PeerLostError
from plutino.wire.tensors import codec_named, transmitted

if TYPE_CHECKING:
    from torch import Tensor

    from plutino.types import Unit

QUEUE_MESSAGES = 2
"""Messages of one kind that may wait between one sender and one receiver."""


class InProcessHub:
    """Connects the transports of one plan within a process."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inboxes: dict[Peer, Inbox] = {}

    def transport(self, own: Peer) -> InProcessTransport:
        """The transport of one stage; make all of them before the first one sends."""
        if own in self._inboxes:
            raise ValueError(f"{own} has its transport already")
        self._inboxes[own] = Inbox(self._changed)
        return InProcessTransport(own, self._inboxes, self._changed)


class InProcessTransport:
    """One stage's end of the hub; see :class:`edge_node.transport.base.Transport`.

    Tensors are copied and go through their codec, so that a stage sees the bits that it would see over the wire.
    """

    def __init__(self, own: Peer, inboxes: dict[Peer, Inbox], changed: threading.Condition) -> None:
        self._own = own
        self._inboxes = inboxes
        self._inbox = inboxes[own]
        self._changed = changed
        self._closed = False

    def send(self, peer: Peer, key: MessageKey, tensors: dict[str, Tensor], *, codec: str = "raw") -> None:
        """Hand a message over; see :meth:`edge_node.transport.base.Transport.send`."""
        wire_codec = codec_named(codec)
        copies = {name: transmitted(name, tensor, wire_codec) for name, tensor in tensors.items()}
        message = Message(copies, sum(copy.nbytes for copy in copies.values()))
        with self._changed:
            while True:
                self._inbox.check_unit(key.unit)
                receiver = self._inboxes.get(peer)
                if self._closed or receiver is None:
                    raise PeerLostError(f"stage {peer.stage_index}.{peer.replica_index} is lost: it was closed")
                has_room = receiver.num_waiting(self._own, key.kind) < QUEUE_MESSAGES
                if has_room or receiver.is_over(key.unit):
                    receiver.put(self._own, key, message)
                    return
                self._changed.wait()

    def receive(self, peer: Peer, key: MessageKey) -> dict[str, Tensor]:
        """Wait for a message; see :meth:`edge_node.transport.base.Transport.receive`."""
        return self._inbox.take(peer, key).tensors

    def cancel(self, unit: Unit) -> None:
        """Abandon a unit; see :meth:`edge_node.transport.base.Transport.cancel`."""
        self._inbox.cancel(unit)

    def finish(self, unit: Unit) -> None:
        """End a unit; see :meth:`edge_node.transport.base.Transport.finish`."""
        self._inbox.finish(unit)

    def close(self) -> None:
        """Leave the hub; whoever waits for this stage gets PeerLostError."""
        with self._changed:
            self._closed = True
            self._inboxes.pop(self._own, None)
            self._inbox.close("this stage was closed")
            for inbox in self._inboxes.values():
                inbox.lose(self._own, "it was closed")
