from __future__ import annotations

import struct
import tracemalloc
import zlib
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plutino.types import Unit, UnitKind
from plutino.wire.frames import AckFrame, ChunkFrame, cut, decode_header, encode_ack, encode_frame, encode_header
from plutino.wire.messages import (
    Ack,
    Bounds,
    Codec,
    DType,
    MessageHeader,
    Origin,
    Refusal,
    RefusedFrameError,
    TensorSpec,
    job_hash,
    layout,
)

ORIGIN = Origin(job_hash("job-1"), 3, 1, 0)
SMALL = (TensorSpec("hidden", DType.FLOAT32, (1, 2, 3)), TensorSpec("lengths", DType.INT64, (1,)))


def message(tensors: tuple[TensorSpec, ...] = SMALL) -> MessageHeader:
    return MessageHeader(
        origin=ORIGIN, kind=1, unit=Unit(UnitKind.TRAIN, 7), micro_batch=2, position=0, sequence=5, tensors=tensors
    )


def frame_of(header: MessageHeader, *, index: int = 0, chunks: int = 1, offset: int = 0, payload: bytes) -> bytes:
    return encode_frame(
        encode_header(header),
        Ack(4, 8),
        index=index,
        num_chunks=chunks,
        offset_bytes=offset,
        payload=[memoryview(payload)],
    )


def small_frame() -> bytes:
    return frame_of(message(), payload=bytes(range(72)))


def sealed_again(frame: bytes) -> bytes:
    """The frame with length and checksum made right, as a malicious or faulty sender would."""
    rest = struct.pack("<I", len(frame)) + frame[12:]
    return frame[:4] + struct.pack("<I", zlib.crc32(rest)) + rest


def refusal_of(frame: bytes, bounds: Bounds | None = None) -> Refusal:
    with pytest.raises(RefusedFrameError) as refused:
        decode_header(frame, bounds or Bounds())
    return refused.value.refusal


def test_decode_chunk_frame_gives_what_was_encoded() -> None:
    chunk = decode_header(small_frame(), Bounds())

    assert isinstance(chunk, ChunkFrame)
    assert chunk.message == message()
    assert chunk.ack == Ack(4, 8)
    assert (chunk.index, chunk.num_chunks, chunk.offset_bytes) == (0, 1, 0)
    assert chunk.payload == bytes(range(72))


def test_decode_ack_frame_gives_what_was_encoded() -> None:
    frame = AckFrame(ORIGIN, Ack(17, 21))

    assert decode_header(encode_ack(frame), Bounds()) == frame


def test_layout_starts_every_tensor_at_a_cache_line() -> None:
    assert layout(SMALL) == ((0, 64), 72)


@given(position=st.integers(0, len(small_frame()) - 1), mask=st.integers(1, 255))
def test_decode_frame_with_any_flipped_bits_in_a_byte_is_refused(position: int, mask: int) -> None:
    frame = bytearray(small_frame())

    frame[position] ^= mask

    assert refusal_of(bytes(frame)) in {Refusal.CORRUPT, Refusal.MALFORMED, Refusal.TRUNCATED}


WIDE = (TensorSpec("hidden", DType.UINT8, (10_007,)),)
WIDE_PAYLOAD = bytes(7 * i % 251 for i in range(10_007))


@given(st.integers(0, len(frame_of(message(WIDE), payload=WIDE_PAYLOAD)) - 1), st.binary(min_size=1, max_size=64))
def test_decode_wide_frame_with_a_changed_stretch_is_refused(start: int, change: bytes) -> None:
    frame = bytearray(frame_of(message(WIDE), payload=WIDE_PAYLOAD))
    assert decode_header(bytes(frame), Bounds()).payload == WIDE_PAYLOAD
    for position, byte in enumerate(change[: len(frame) - start], start=start):
        frame[position] ^= byte or 1

    assert refusal_of(bytes(frame)) in {Refusal.CORRUPT, Refusal.MALFORMED, Refusal.TRUNCATED}


@given(st.lists(st.integers(1, 10_006), max_size=4).map(sorted))
def test_frame_of_a_payload_in_pieces_is_that_of_the_whole(borders: list[int]) -> None:
    cuts = [0, *borders, len(WIDE_PAYLOAD)]
    pieces = [memoryview(WIDE_PAYLOAD)[start:end] for start, end in pairwise(cuts)]
    header = encode_header(message(WIDE))

    frame = encode_frame(header, Ack(4, 8), index=0, num_chunks=1, offset_bytes=0, payload=pieces)

    assert frame == frame_of(message(WIDE), payload=WIDE_PAYLOAD)


@given(position=st.integers(12, len(small_frame()) - 1), value=st.integers(0, 255))
def test_decode_frame_with_any_byte_forged_never_fails_otherwise_than_by_refusal(position: int, value: int) -> None:
    frame = bytearray(small_frame())
    frame[position] = value

    try:
        decoded = decode_header(sealed_again(bytes(frame)), Bounds())
    except RefusedFrameError:
        return

    assert isinstance(decoded, ChunkFrame)
    assert len(decoded.payload) == 72


@pytest.mark.parametrize("num_bytes", [0, 3, 11, 12, 40, len(small_frame()) - 1])
def test_decode_frame_cut_short_is_refused_as_truncated(num_bytes: int) -> None:
    assert refusal_of(small_frame()[:num_bytes]) is Refusal.TRUNCATED


@given(num_bytes=st.integers(12, len(small_frame()) - 1))
def test_decode_frame_cut_short_and_sealed_again_is_refused(num_bytes: int) -> None:
    assert refusal_of(sealed_again(small_frame()[:num_bytes])) is Refusal.MALFORMED


def test_decode_frame_with_bytes_behind_its_end_is_refused() -> None:
    assert refusal_of(small_frame() + b"\0") is Refusal.MALFORMED


def test_decode_frame_that_claims_a_tebibyte_is_refused_without_allocating_it() -> None:
    giant = message((TensorSpec("hidden", DType.FLOAT32, (1 << 20, 1 << 18)),))
    frame = frame_of(giant, chunks=1 << 20, payload=b"x")
    tracemalloc.start()

    refusal = refusal_of(frame)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert refusal is Refusal.OVERSIZED
    assert peak_bytes < 1 << 16


def test_decode_frame_whose_codec_hides_its_size_is_bounded_by_the_decoded_size() -> None:
    rounded = message((TensorSpec("hidden", DType.FLOAT64, (100,), Codec.BF16),))

    assert refusal_of(frame_of(rounded, payload=bytes(200)), Bounds(max_message_bytes=799)) is Refusal.OVERSIZED


@pytest.mark.parametrize(
    ("tensors", "bounds"),
    [
        (SMALL, Bounds(max_tensors=1)),
        (SMALL, Bounds(max_message_bytes=31)),
        (SMALL, Bounds(max_dimension=2)),
    ],
)
def test_decode_frame_beyond_a_bound_is_refused_as_oversized(tensors: tuple[TensorSpec, ...], bounds: Bounds) -> None:
    assert refusal_of(frame_of(message(tensors), payload=bytes(72)), bounds) is Refusal.OVERSIZED


@pytest.mark.parametrize(
    "tensors",
    [
        (TensorSpec("deep", DType.UINT8, (1, 1, 1, 1, 1)),),
        (TensorSpec("ids", DType.INT64, (1,), Codec.BF16),),
        (TensorSpec("twice", DType.UINT8, (1,)), TensorSpec("twice", DType.UINT8, (1,))),
    ],
)
def test_decode_frame_with_an_impossible_table_is_refused(tensors: tuple[TensorSpec, ...]) -> None:
    payload = bytes(message(tensors).payload_bytes)

    assert refusal_of(frame_of(message(tensors), payload=payload)) is Refusal.MALFORMED


@pytest.mark.parametrize(("field", "value"), [("dtype", 99), ("codec", 99)])
def test_decode_frame_with_an_unknown_code_is_refused(field: str, value: int) -> None:
    frame = bytearray(small_frame())
    table_start = len(frame) - 72 - (12 + 12 + 6) - (12 + 4 + 7)
    frame[table_start + {"dtype": 1, "codec": 2}[field]] = value

    assert refusal_of(sealed_again(bytes(frame))) is Refusal.MALFORMED


@pytest.mark.parametrize(("index", "chunks", "offset", "num_bytes"), [(0, 2, 0, 72), (1, 1, 0, 72), (0, 1, 8, 72)])
def test_decode_frame_whose_chunk_does_not_fit_its_message_is_refused(
    index: int, chunks: int, offset: int, num_bytes: int
) -> None:
    frame = frame_of(message(), index=index, chunks=chunks, offset=offset, payload=bytes(num_bytes))

    assert refusal_of(frame) is Refusal.MALFORMED


@given(
    sizes=st.lists(st.integers(0, 9), max_size=5),
    start=st.integers(0, 45),
    length=st.integers(0, 45),
)
def test_cut_gives_the_bytes_of_the_concatenation(sizes: list[int], start: int, length: int) -> None:
    pieces = [bytes([index] * size) for index, size in enumerate(sizes)]

    views = cut([memoryview(piece) for piece in pieces], start, start + length)

    assert b"".join(views) == b"".join(pieces)[start : start + length]


def test_bounds_that_cannot_hold_one_message_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot hold"):
        Bounds(max_message_bytes=100, max_inbox_bytes=99)
