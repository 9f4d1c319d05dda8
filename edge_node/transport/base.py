"""The seam between the executor and whatever carries tensors between stages."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Protocol

from plutino.types import Unit

if TYPE_CHECKING:
    from torch import Tensor


class MessageKind(IntEnum):
    """What a message between two workers carries."""

    FORWARD = 1
    """Hidden states and the micro-batch's metadata, to the next stage."""
    BACKWARD = 2
    """Gradient of the hidden states, to the previous stage."""
    TOKENS = 3
    """Sampled token ids, last stage to first."""
    PARTIAL_GRADIENT = 4
    """The sum of shared parameters' gradients so far, to the holder who adds the next ones."""
    TOTAL_GRADIENT = 5
    """The summed gradients of shared parameters, from holder to holder."""
    REFERENCE = 6
    """As FORWARD, of the pass with the adapter switched off that comes before a unit's own."""
    CACHE_KEYS = 7
    """What a micro-batch's rows are called in activation caches, to the next stage."""
    CACHE_NEEDS = 8
    """Whether a micro-batch's hidden states are needed here or above, to the previous stage."""
    CACHE_ENTRIES = 9
    """A micro-batch's entries at one place of the model, to whoever keeps them for epochs from the cache."""
    FIRST_FORWARD = 10
    """As FORWARD, of the passes without a side network that its first values follow from."""
    FIRST_BACKWARD = 11
    """As BACKWARD, of the same."""


@dataclass(frozen=True, slots=True)
class Peer:
    """Another worker of the same plan."""

    stage_index: int
    replica_index: int = 0


@dataclass(frozen=True, slots=True)
class MessageKey:
    """What a receiver waits for. Together with the sender it names a message exactly once in a plan epoch."""

    kind: MessageKind
    unit: Unit
    micro_batch: int
    """Micro-batch of the unit (group of rows, in generation)."""
    position: int = 0
    """Round of generation; 0 otherwise."""


class Transport(Protocol):
    """Carries named tensors between the workers of one plan epoch, each message exactly once and whole."""

    def send(self, peer: Peer, key: MessageKey, tensors: dict[str, Tensor], *, codec: str = "raw") -> None:
        """Queue a message; blocks only while the peer's queue is full.

        ``codec`` applies to floating tensors named "hidden" or "source" and to their gradients; everything else
        travels raw. The tensors
        must not be changed afterwards.

        Raises:
            PeerLostError: the stream to the peer is gone for good.
            UnitCancelledError: :meth:`cancel` was called for the message's unit.
        """

    def receive(self, peer: Peer, key: MessageKey) -> dict[str, Tensor]:
        """Wait for a message from a peer.

        Raises:
            PeerLostError: the stream to the peer is gone for good.
            UnitCancelledError: :meth:`cancel` was called for the message's unit.
        """

    def cancel(self, unit: Unit) -> None:
        """Wake whoever waits for a message of this unit, drop what has come of it and what will still come."""

    def finish(self, unit: Unit) -> None:
        """The unit is over: whatever still arrives of it, or of earlier ones of its kind, is stale."""

    def close(self) -> None:
        """End all streams; waiting callers get PeerLostError."""


class UnitCancelledError(Exception):
    """The unit was abandoned by the coordinator; not a failure."""
