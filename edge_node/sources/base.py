"""What gives the bytes of stored tensors to a worker, from elsewhere: the hub, another device, the coordinator.

A source knows nothing of checksums, caches or retries over sources: :mod:`edge_node.sources.shared` checks what comes,
keeps it and goes on with the next source where one fails.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from plutino.errors import ModelError
from plutino.safetensors_index import TensorEntry


class SourceError(ModelError):
    """A source did not give a tensor; another one may.

    Args:
        message: what happened, and the way out.
        is_lost: the source will not give any other tensor either.
    """

    def __init__(self, message: str, *, is_lost: bool = False) -> None:
        super().__init__(message)
        self.is_lost = is_lost


@dataclass(frozen=True, slots=True)
class WantedTensor:
    """One tensor as the manifest has it."""

    name: str
    entry: TensorEntry
    sha256: str

    @property
    def num_bytes(self) -> int:
        """Stored bytes."""
        return self.entry.end - self.entry.start


class ByteSource(Protocol):
    """Somebody who may give tensors' bytes. Used by several threads at once."""

    @property
    def name(self) -> str:
        """Who it is, for people: hub, coordinator, device NAME."""

    def holds(self, wanted: WantedTensor) -> bool:
        """Whether asking for the tensor makes sense now."""

    def stream(self, wanted: WantedTensor, offset: int) -> Iterator[bytes | memoryview]:
        """The tensor's bytes from ``offset`` on, in pieces, as they come.

        Raises:
            SourceError: the source does not answer, refuses, or stalls.
        """

    def close(self) -> None:
        """Let go of connections."""
