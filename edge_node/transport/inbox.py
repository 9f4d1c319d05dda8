"""Messages that have come and wait for their consumer, and the rule which units are over."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from edge_node.transport.base import MessageKey, MessageKind, Peer, UnitCancelledError
from plutino.errors import PeerLostError, StaleFrameError
from plutino.types import Unit, UnitKind

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Message:
    """Tensors of one message and the memory they take."""

    tensors: dict[str, Tensor]
    num_bytes: int


class Arrival(Enum):
    """What became of a message that came."""

    STORED = "stored"
    STALE_UNIT = "stale_unit"
    DUPLICATE = "duplicate"


class UnitFence:
    """Which units are over: cancelled one by one, or finished up to a serial of their kind. Not thread-safe."""

    def __init__(self) -> None:
        self._cancelled: set[Unit] = set()
        self._finished_through: dict[UnitKind, int] = {}

    def cancel(self, unit: Unit) -> None:
        """The unit was abandoned."""
        self._cancelled.add(unit)

    def finish(self, unit: Unit) -> None:
        """The unit and all earlier ones of its kind are over."""
        self._finished_through[unit.kind] = max(unit.serial, self._finished_through.get(unit.kind, unit.serial))
        # What the fence covers by its serial need not be remembered one by one.
        self._cancelled = {other for other in self._cancelled if not self._is_finished(other)}

    def is_cancelled(self, unit: Unit) -> bool:
        """Whether the unit was abandoned and not passed since."""
        return unit in self._cancelled

    def is_over(self, unit: Unit) -> bool:
        """Whether nothing of the unit is wanted any more."""
        return unit in self._cancelled or self._is_finished(unit)

    def _is_finished(self, unit: Unit) -> bool:
        return unit.serial <= self._finished_through.get(unit.kind, -1)


class Inbox:
    """Keeps messages by sender and key until they are taken. Thread-safe; bounds are its callers' affair.

    Args:
        changed: Notified of every change. Inboxes may share one.
    """

    def __init__(self, changed: threading.Condition | None = None) -> None:
        self._changed = changed or threading.Condition()
        self._messages: dict[tuple[Peer, MessageKey], Message] = {}
        self._fence = UnitFence()
        self._lost: dict[Peer, str] = {}
        self._closed_reason = ""

    def put(self, sender: Peer, key: MessageKey, message: Message) -> Arrival:
        """Store a message, or say why it is not wanted."""
        with self._changed:
            if self._closed_reason or self._fence.is_over(key.unit):
                return Arrival.STALE_UNIT
            if (sender, key) in self._messages:
                return Arrival.DUPLICATE
            self._messages[sender, key] = message
            self._changed.notify_all()
            return Arrival.STORED

    def take(self, sender: Peer, key: MessageKey) -> Message:
        """Wait for a message and remove it. What came before the sender was lost can still be taken.

        Raises:
            UnitCancelledError: the unit was cancelled.
            PeerLostError: the sender is lost or the inbox is closed.
            StaleFrameError: the unit was finished; nothing of it will come.
        """
        with self._changed:
            while True:
                self.check_unit(key.unit)
                message = self._messages.pop((sender, key), None)
                if message is not None:
                    self._changed.notify_all()
                    return message
                if self._fence.is_over(key.unit):
                    raise StaleFrameError(f"{key} of {sender} is waited for after its unit was finished")
                reason = self._closed_reason or self._lost.get(sender, "")
                if reason:
                    raise PeerLostError(f"stage {sender.stage_index}.{sender.replica_index} is lost: {reason}")
                self._changed.wait()

    def check_unit(self, unit: Unit) -> None:
        """Raise UnitCancelledError if the unit was cancelled."""
        with self._changed:
            if self._fence.is_cancelled(unit):
                raise UnitCancelledError(f"{unit} was cancelled")

    def is_over(self, unit: Unit) -> bool:
        """Whether messages of this unit are dropped."""
        with self._changed:
            return self._fence.is_over(unit)

    def num_waiting(self, sender: Peer, kind: MessageKind) -> int:
        """Messages of one kind from one sender that were not taken yet."""
        with self._changed:
            return sum(peer == sender and key.kind == kind for peer, key in self._messages)

    def cancel(self, unit: Unit) -> list[tuple[Peer, Message]]:
        """Abandon a unit, wake its waiters, and give back what had come of it."""
        with self._changed:
            self._fence.cancel(unit)
            return self._drop(self._fence.is_over)

    def finish(self, unit: Unit) -> list[tuple[Peer, Message]]:
        """End a unit and all earlier ones of its kind, and give back what nobody took of them."""
        with self._changed:
            self._fence.finish(unit)
            return self._drop(self._fence.is_over)

    def lose(self, sender: Peer, reason: str) -> None:
        """Nothing more will come from this sender."""
        with self._changed:
            self._lost.setdefault(sender, reason)
            self._changed.notify_all()

    def close(self, reason: str) -> None:
        """Drop everything and wake all waiters with PeerLostError."""
        with self._changed:
            self._closed_reason = reason
            self._messages.clear()
            self._changed.notify_all()

    def _drop(self, is_unwanted: Callable[[Unit], bool]) -> list[tuple[Peer, Message]]:
        unwanted = [place for place in self._messages if is_unwanted(place[1].unit)]
        self._changed.notify_all()
        return [(place[0], self._messages.pop(place)) for place in unwanted]
