"""What travels between workers, as values: messages of named tensors, who sends them, and what a receiver allows.

How they look as bytes is :mod:`plutino.wire.frames`. Nothing here knows of torch or gRPC.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum
from math import prod

from plutino.errors import FrameError
from plutino.types import Unit

ALIGNMENT_BYTES = 64
"""Where tensors start: a cache line, as torch's own allocator. Kernels may round differently at another alignment."""

MAX_RANK = 4

MAX_NAME_BYTES = 255
"""Longest tensor name in UTF-8; its length is one byte of the tensor table."""


class DType(IntEnum):
    """Element types that may travel; the numbers are part of the format."""

    FLOAT32 = 1
    FLOAT16 = 2
    BFLOAT16 = 3
    FLOAT64 = 4
    INT64 = 5
    INT32 = 6
    INT16 = 7
    INT8 = 8
    UINT8 = 9
    BOOL = 10

    @property
    def num_bytes(self) -> int:
        """Width of one element."""
        return _ELEMENT_BYTES[self]


_ELEMENT_BYTES = {
    DType.FLOAT32: 4,
    DType.FLOAT16: 2,
    DType.BFLOAT16: 2,
    DType.FLOAT64: 8,
    DType.INT64: 8,
    DType.INT32: 4,
    DType.INT16: 2,
    DType.INT8: 1,
    DType.UINT8: 1,
    DType.BOOL: 1,
}


class Codec(IntEnum):
    """How a tensor's elements are written; the numbers are part of the format."""

    RAW = 1
    BF16 = 2
    """Wider floats, rounded to bfloat16."""


BF16_SOURCES = frozenset({DType.FLOAT32, DType.FLOAT64, DType.FLOAT16})
"""Element types that :attr:`Codec.BF16` writes."""


class Refusal(Enum):
    """Why a frame was not let in; the values name the counters."""

    CORRUPT = "corrupt"
    TRUNCATED = "truncated"
    OVERSIZED = "oversized"
    MALFORMED = "malformed"
    UNCREDITED = "uncredited"
    DUPLICATE = "duplicate"
    STALE_JOB = "stale_job"
    STALE_EPOCH = "stale_epoch"
    STALE_UNIT = "stale_unit"
    UNKNOWN_SENDER = "unknown_sender"


class RefusedFrameError(FrameError):
    """A frame that breaks the format or a bound, with the name of the reason."""

    def __init__(self, refusal: Refusal, message: str) -> None:
        super().__init__(message)
        self.refusal = refusal


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What a receiver lets a peer make it hold. The defaults bound; they reserve nothing."""

    max_message_bytes: int = 64 << 20
    """Tensors of one message, decoded."""
    max_inbox_messages: int = 4
    """Messages of one peer that wait to be taken or are on their way."""
    max_inbox_bytes: int = 256 << 20
    """The same in bytes, decoded; at least one message always fits."""
    max_tensors: int = 64
    """Tensors in one message."""
    max_dimension: int = (1 << 31) - 1
    """Longest axis of a tensor: rows, tokens, hidden size or vocabulary."""

    def __post_init__(self) -> None:
        if min(self.max_message_bytes, self.max_inbox_messages, self.max_tensors) < 1:
            raise ValueError("every bound must let at least one thing through")
        if self.max_inbox_bytes < self.max_message_bytes:
            raise ValueError(
                f"an inbox of {self.max_inbox_bytes} bytes cannot hold a message of {self.max_message_bytes} bytes"
            )


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One row of a message's tensor table."""

    name: str
    dtype: DType
    """Of the decoded tensor, whatever the codec writes."""
    shape: tuple[int, ...]
    codec: Codec = Codec.RAW

    @property
    def wire_bytes(self) -> int:
        """Bytes that the elements take on the wire."""
        width = DType.BFLOAT16.num_bytes if self.codec is Codec.BF16 else self.dtype.num_bytes
        return prod(self.shape) * width

    @property
    def decoded_bytes(self) -> int:
        """Bytes that the elements take in memory."""
        return prod(self.shape) * self.dtype.num_bytes


@dataclass(frozen=True, slots=True)
class Origin:
    """Who sends: the job and plan generation, and the worker in it."""

    job_hash: int
    plan_epoch: int
    stage_index: int
    replica_index: int


@dataclass(frozen=True, slots=True)
class Ack:
    """How far the receiver is, and how far the sender may go. Both only ever rise."""

    received_through: int
    """The receiver has every message up to this sequence number whole; 0: none."""
    credit_through: int
    """The sender may send messages up to this sequence number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageHeader:
    """What every chunk of a message repeats."""

    origin: Origin
    kind: int
    unit: Unit
    micro_batch: int
    position: int
    sequence: int
    """Counts the sender's messages to this receiver in this plan epoch, from 1."""
    tensors: tuple[TensorSpec, ...]

    @property
    def payload_bytes(self) -> int:
        """Length of all chunks' payloads together."""
        return layout(self.tensors)[1]

    @property
    def decoded_bytes(self) -> int:
        """Memory that the decoded tensors take."""
        return sum(tensor.decoded_bytes for tensor in self.tensors)


def job_hash(job_id: str) -> int:
    """Eight bytes that stand for a job in every frame."""
    return int.from_bytes(hashlib.sha256(job_id.encode()).digest()[:8], "little")


def layout(tensors: Sequence[TensorSpec]) -> tuple[tuple[int, ...], int]:
    """Where each tensor starts in a message's payload, and the length of the payload, in bytes."""
    offsets: list[int] = []
    end = 0
    for tensor in tensors:
        start = -(-end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        offsets.append(start)
        end = start + tensor.wire_bytes
    return tuple(offsets), end
