"""Frames of the data streams between workers: what one gRPC message holds, checked before anything is allocated.

A message (named tensors under one header) is cut into chunks; a frame is one chunk with the whole header, so that
every frame can be judged alone. An acknowledgement is a frame of its own and also rides on every chunk. All numbers are
little-endian.

    chunk frame   magic  crc  frame length | ack, chunk | job, epoch, unit, sender, sequence | tensor table | payload
    ack frame     magic  crc  frame length | job, epoch, sender | ack

Tensors start at multiples of 64 bytes in a message's payload; the gaps are zeros. The checksum is CRC-32 as in zlib and
covers all that follows it; a payload of 4 KiB or more is laid in 16 parts, whose words are added up before, so that the
CRC runs over a sixteenth of it. That takes a quarter of the processor's time (measured: 0.17 ms a MiB, CRC-32 alone
0.65), neither holds the interpreter lock, and a change within one part is found as before; what it would not find is
words that change by opposite amounts in the same place of two parts, or parts that change places.

Entry points: :func:`encode_header` and :func:`encode_frame`, :func:`encode_ack`, :func:`decode_header`. Nothing here
knows of torch, of gRPC or of what message kinds mean.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from plutino.types import Unit, UnitKind
from plutino.wire.messages import (
    BF16_SOURCES,
    MAX_NAME_BYTES,
    MAX_RANK,
    Ack,
    Bounds,
    Codec,
    DType,
    MessageHeader,
    Origin,
    Refusal,
    RefusedFrameError,
    TensorSpec,
)

MAX_CHUNK_BYTES = 4 << 20
"""Most payload in one frame."""

CHUNK_BYTES = 1 << 20
"""Payload that we put in one frame. Measured: 64 KiB chunks take twice as long, 4 MiB chunks overlap less."""

_CHUNK_MAGIC = b"PLC\x02"
_ACK_MAGIC = b"PLA\x01"
# Magic, CRC-32 of all that follows the field, length of the frame.
_PREFIX = struct.Struct("<4sII")
_CRC_END = 8
# received_through, credit_through.
_ACK = struct.Struct("<QQ")
# Chunk index, number of chunks, offset and length of the chunk's payload.
_CHUNK = struct.Struct("<IIQI")
# Job hash, plan epoch, sender's stage and replica.
_ORIGIN = struct.Struct("<QIHH")
# Message kind, unit kind, unit serial, micro-batch, position, sequence, payload of all chunks, tensors, table length.
_MESSAGE = struct.Struct("<BBQIIQQHI")
# Length of the name, dtype, codec, rank, bytes on the wire; the dimensions (u32) and the name follow.
_TENSOR = struct.Struct("<BBBBQ")
_DIMENSION_BYTES = 4
_NUM_FOLDS = 16
_LEAST_FOLDED_BYTES = 4096
_MAX_ROW_BYTES = _TENSOR.size + MAX_RANK * _DIMENSION_BYTES + MAX_NAME_BYTES


@dataclass(frozen=True, slots=True)
class ChunkFrame:
    """A decoded chunk; ``payload`` is a view of the frame it came in."""

    message: MessageHeader
    ack: Ack
    index: int
    num_chunks: int
    offset_bytes: int
    payload: memoryview = field(repr=False)


@dataclass(frozen=True, slots=True)
class AckFrame:
    """An acknowledgement alone; the first thing that both ends of a stream say."""

    origin: Origin
    ack: Ack


def num_chunks(payload_bytes: int) -> int:
    """Number of frames that a message of this length takes; an empty one takes one."""
    return max(1, -(-payload_bytes // CHUNK_BYTES))


def encode_header(header: MessageHeader) -> bytes:
    """The part of a frame that all chunks of a message share: everything between chunk fields and payload."""
    table = b"".join(_encode_tensor(tensor) for tensor in header.tensors)
    message = _MESSAGE.pack(
        header.kind,
        header.unit.kind,
        header.unit.serial,
        header.micro_batch,
        header.position,
        header.sequence,
        header.payload_bytes,
        len(header.tensors),
        len(table),
    )
    return _encode_origin(header.origin) + message + table


def encode_frame(
    encoded_header: bytes, ack: Ack, *, index: int, num_chunks: int, offset_bytes: int, payload: Sequence[memoryview]
) -> bytes:
    """Join one chunk's frame; this is the only copy of a payload in one piece on the way out.

    Args:
        encoded_header: What :func:`encode_header` gave.
        ack: What is acknowledged to the receiver on this occasion.
        index: Number of the chunk, from 0.
        num_chunks: Number of chunks of the message.
        offset_bytes: Where the chunk starts in the message's payload.
        payload: The chunk's bytes, in pieces (memoryviews of bytes).
    """
    joined = payload[0] if len(payload) == 1 else memoryview(b"".join(payload))
    chunk = _CHUNK.pack(index, num_chunks, offset_bytes, joined.nbytes)
    head = _ACK.pack(ack.received_through, ack.credit_through) + chunk + encoded_header
    return _seal(_CHUNK_MAGIC, head, joined)


def encode_ack(frame: AckFrame) -> bytes:
    """One acknowledgement as a frame."""
    ack = _ACK.pack(frame.ack.received_through, frame.ack.credit_through)
    return _seal(_ACK_MAGIC, _encode_origin(frame.origin) + ack, memoryview(b""))


def decode_header(frame: bytes, bounds: Bounds) -> ChunkFrame | AckFrame:
    """Read a frame, checksum and bounds first; allocates nothing that grows with what the frame claims.

    Raises:
        RefusedFrameError: the frame is corrupted, truncated, malformed, or claims more than ``bounds`` allow.
    """
    if len(frame) < _PREFIX.size:
        raise RefusedFrameError(Refusal.TRUNCATED, f"a frame of {len(frame)} bytes is shorter than a frame's prefix")
    magic, checksum, frame_bytes = _PREFIX.unpack_from(frame)
    _require(magic in (_CHUNK_MAGIC, _ACK_MAGIC), f"no frame of this version starts with {magic!r}")
    if len(frame) < frame_bytes:
        raise RefusedFrameError(Refusal.TRUNCATED, f"{len(frame)} bytes came of a frame of {frame_bytes}")
    _require(len(frame) == frame_bytes, f"{len(frame)} bytes came for a frame of {frame_bytes}")
    view = memoryview(frame)
    payload_start = len(view) - _announced_payload_bytes(view)
    if _checksum(view[_CRC_END:payload_start], view[payload_start:]) != checksum:
        raise RefusedFrameError(Refusal.CORRUPT, f"a frame of {frame_bytes} bytes does not match its checksum")
    try:
        return _decode_ack(view) if magic == _ACK_MAGIC else _decode_chunk(view, bounds)
    except (struct.error, ValueError) as error:
        # The header passes the frame's end, or a name, a dtype, a codec or a unit's kind is none.
        raise RefusedFrameError(Refusal.MALFORMED, f"a frame of {frame_bytes} bytes is no frame: {error}") from error


def cut(pieces: Sequence[memoryview], start: int, end: int) -> list[memoryview]:
    """The bytes ``[start, end)`` of the pieces' concatenation, as views."""
    views: list[memoryview] = []
    piece_start = 0
    for piece in pieces:
        piece_end = piece_start + piece.nbytes
        if piece_start < end and start < piece_end:
            views.append(piece[max(start - piece_start, 0) : min(end, piece_end) - piece_start])
        piece_start = piece_end
    return views


def _seal(magic: bytes, head: bytes, payload: memoryview) -> bytes:
    frame_bytes = _PREFIX.size + len(head) + payload.nbytes
    checksum = _checksum(struct.pack("<I", frame_bytes) + head, payload)
    return b"".join([_PREFIX.pack(magic, checksum, frame_bytes), head, payload])


def _checksum(head: bytes | memoryview, payload: memoryview) -> int:
    checksum = zlib.crc32(head)
    num_words = payload.nbytes // (8 * _NUM_FOLDS) if payload.nbytes >= _LEAST_FOLDED_BYTES else 0
    folded_bytes = num_words * 8 * _NUM_FOLDS
    if num_words:
        words = np.frombuffer(payload[:folded_bytes], "<u8").reshape(_NUM_FOLDS, num_words)
        checksum = zlib.crc32(np.add.reduce(words, axis=0).astype("<u8", copy=False).data, checksum)
    return zlib.crc32(payload[folded_bytes:], checksum)


def _announced_payload_bytes(view: memoryview) -> int:
    """What a frame that is not checked yet says of its payload; 0 where that cannot be."""
    chunk_start = _PREFIX.size + _ACK.size
    if view[: len(_CHUNK_MAGIC)] != _CHUNK_MAGIC or len(view) < chunk_start + _CHUNK.size:
        return 0
    payload_bytes: int = _CHUNK.unpack_from(view, chunk_start)[3]
    return payload_bytes if payload_bytes <= len(view) - chunk_start - _CHUNK.size else 0


def _encode_origin(origin: Origin) -> bytes:
    return _ORIGIN.pack(origin.job_hash, origin.plan_epoch, origin.stage_index, origin.replica_index)


def _encode_tensor(tensor: TensorSpec) -> bytes:
    name = tensor.name.encode()
    row = _TENSOR.pack(len(name), tensor.dtype, tensor.codec, len(tensor.shape), tensor.wire_bytes)
    return row + struct.pack(f"<{len(tensor.shape)}I", *tensor.shape) + name


def _decode_ack(view: memoryview) -> AckFrame:
    at = _PREFIX.size
    origin = Origin(*_ORIGIN.unpack_from(view, at))
    ack = Ack(*_ACK.unpack_from(view, at + _ORIGIN.size))
    _require(len(view) == at + _ORIGIN.size + _ACK.size, f"an acknowledgement of {len(view)} bytes")
    return AckFrame(origin, ack)


def _decode_chunk(view: memoryview, bounds: Bounds) -> ChunkFrame:
    at = _PREFIX.size
    ack = Ack(*_ACK.unpack_from(view, at))
    at += _ACK.size
    index, chunks, offset_bytes, chunk_bytes = _CHUNK.unpack_from(view, at)
    at += _CHUNK.size
    origin = Origin(*_ORIGIN.unpack_from(view, at))
    at += _ORIGIN.size
    kind, unit_kind, serial, micro_batch, position, sequence, total_bytes, num_tensors, table_bytes = (
        _MESSAGE.unpack_from(view, at)
    )
    at += _MESSAGE.size
    payload = view[at + table_bytes :]
    _require(at + table_bytes <= len(view), f"a tensor table of {table_bytes} bytes passes the frame's end")
    _require(len(payload) == chunk_bytes, f"{len(payload)} bytes of payload where {chunk_bytes} are announced")
    _bound(chunk_bytes, MAX_CHUNK_BYTES, "bytes of payload in one frame")
    _bound(num_tensors, bounds.max_tensors, "tensors in one message")
    _require(sequence > 0, "messages are numbered from 1")
    _bound(table_bytes, num_tensors * _MAX_ROW_BYTES, "bytes of tensor table")
    tensors = _decode_table(bytes(view[at : at + table_bytes]), num_tensors, bounds)
    header = MessageHeader(
        origin=origin,
        kind=kind,
        unit=Unit(UnitKind(unit_kind), serial),
        micro_batch=micro_batch,
        position=position,
        sequence=sequence,
        tensors=tensors,
    )
    payload_bytes = header.payload_bytes
    _require(payload_bytes == total_bytes, f"tensors of {payload_bytes} bytes announced as {total_bytes}")
    _bound(header.decoded_bytes, bounds.max_message_bytes, "bytes in one message")
    is_last = offset_bytes + chunk_bytes == total_bytes
    _require(offset_bytes + chunk_bytes <= total_bytes, f"a chunk ends after its message of {total_bytes} bytes")
    _require(index < chunks and is_last == (index == chunks - 1), f"chunk {index} of {chunks} ends at the wrong byte")
    _require(chunk_bytes > 0 or chunks == 1, "an empty chunk")
    return ChunkFrame(header, ack, index, chunks, offset_bytes, payload)


# The messages of a boundary repeat their table, so most are read once; what is refused is not remembered.
@lru_cache(maxsize=64)
def _decode_table(table: bytes, num_tensors: int, bounds: Bounds) -> tuple[TensorSpec, ...]:
    tensors: list[TensorSpec] = []
    at = 0
    for _ in range(num_tensors):
        name_bytes, dtype, codec, rank, wire_bytes = _TENSOR.unpack_from(table, at)
        at += _TENSOR.size
        _require(rank <= MAX_RANK, f"a tensor of rank {rank}; at most {MAX_RANK} axes travel")
        shape = struct.unpack_from(f"<{rank}I", table, at)
        at += rank * _DIMENSION_BYTES
        name = table[at : at + name_bytes]
        at += name_bytes
        _require(at <= len(table), f"{num_tensors} tensors do not fit in a table of {len(table)} bytes")
        tensor = TensorSpec(name.decode(), DType(dtype), shape, Codec(codec))
        _require(
            tensor.codec is Codec.RAW or tensor.dtype in BF16_SOURCES,
            f"codec {tensor.codec.name} does not write {tensor.dtype.name}",
        )
        _bound(max(shape, default=0), bounds.max_dimension, "elements along one axis")
        _require(tensor.wire_bytes == wire_bytes, f"shape {shape} takes {tensor.wire_bytes} bytes, not {wire_bytes}")
        tensors.append(tensor)
    _require(at == len(table), f"{len(table) - at} bytes too many in a tensor table")
    _require(len({tensor.name for tensor in tensors}) == num_tensors, "two tensors of one name")
    return tuple(tensors)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RefusedFrameError(Refusal.MALFORMED, message)


def _bound(value: int, maximum: int, what: str) -> None:
    if value > maximum:
        raise RefusedFrameError(Refusal.OVERSIZED, f"{value} {what}, where {maximum} are allowed")
