from __future__ import annotations

import pytest

from plutino.errors import FrameError
from plutino.wire.chunks import decode_chunk, encode_chunk
from protos import bulk_pb2

SIZES = [0, 1, 127, 128, 16383, 16384, 1 << 20]


@pytest.mark.parametrize("size", SIZES)
def test_chunk_is_the_message_that_protobuf_writes_and_reads(size):
    data = bytes(range(256)) * (size // 256) + bytes(size % 256)

    assert bulk_pb2.BulkChunk.FromString(encode_chunk(data)).data == data
    assert decode_chunk(bulk_pb2.BulkChunk(data=data).SerializeToString()) == data
    assert decode_chunk(encode_chunk(data)) == data


@pytest.mark.parametrize(
    "message", [b"\x0a", b"\x0a\x05abc", b"\x0a\x01abc", b"\x12\x01a", b"\x0a\xff\xff\xff\xff\xff\xff"]
)
def test_other_messages_are_refused(message):
    with pytest.raises(FrameError, match="something else than chunks"):
        decode_chunk(message)
