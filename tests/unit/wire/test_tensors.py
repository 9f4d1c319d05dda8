from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

from plutino.errors import ConfigError, FrameError
from plutino.wire.messages import Codec, layout
from plutino.wire.tensors import BufferPool, codec_named, describe, pack, transmitted, unpack

DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def over_the_wire(
    tensors: dict[str, torch.Tensor], codec: str = "raw", pool: BufferPool | None = None
) -> dict[str, torch.Tensor]:
    specs = describe(tensors, codec_named(codec))
    payload = b"".join(pack(specs, tensors))
    assert len(payload) == layout(specs)[1]
    memory = (pool or BufferPool()).lend(len(payload))
    memory.numpy()[: len(payload)] = np.frombuffer(payload, np.uint8)
    return unpack(specs, memory)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (0, 4), (3, 5), (2, 3, 4, 5)])
def test_raw_tensor_of_every_dtype_and_rank_keeps_its_bits(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (torch.randn(shape) * 50).to(dtype)

    received = over_the_wire({"x": tensor})["x"]

    assert received.dtype == dtype
    assert received.shape == shape
    assert torch.equal(received, tensor)


def test_pack_of_a_contiguous_tensor_copies_nothing() -> None:
    tensor = torch.zeros(4)
    pieces = pack(describe({"x": tensor}, Codec.RAW), {"x": tensor})

    tensor.fill_(1.0)

    assert b"".join(pieces) == torch.ones(4).numpy().tobytes()


def test_tensor_with_strides_and_graph_arrives_contiguous_and_detached() -> None:
    tensor = torch.randn(4, 6, requires_grad=True).t()

    received = over_the_wire({"hidden": tensor})["hidden"]

    assert torch.equal(received, tensor)
    assert received.is_contiguous()
    assert not received.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_bf16_codec_rounds_coded_names_and_restores_their_dtype(dtype: torch.dtype) -> None:
    hidden, mask = torch.randn(3, 4, dtype=dtype), torch.randn(3, dtype=dtype)

    received = over_the_wire({"hidden": hidden, "mask": mask}, "bf16")

    assert torch.equal(received["hidden"], hidden.to(torch.bfloat16).to(dtype))
    assert received["hidden"].dtype == dtype
    assert torch.equal(received["mask"], mask)


@pytest.mark.parametrize("codec", ["raw", "bf16"])
def test_transmitted_gives_the_bits_that_the_wire_gives(codec: str) -> None:
    gradient = torch.randn(5, 3).t()

    copy = transmitted("gradient", gradient, codec_named(codec))

    assert torch.equal(copy, over_the_wire({"gradient": gradient}, codec)["gradient"])
    assert copy.data_ptr() != gradient.data_ptr()
    assert copy.is_contiguous()


def test_received_tensors_lie_at_cache_lines_as_torch_allocates_them() -> None:
    received = over_the_wire({"a": torch.ones(3), "b": torch.ones(5), "c": torch.ones(1)})

    assert {tensor.data_ptr() % 64 for tensor in received.values()} == {0}


def test_pool_does_not_lend_a_buffer_again_while_a_view_of_a_tensor_lives() -> None:
    pool = BufferPool()
    view = over_the_wire({"x": torch.arange(8.0)}, pool=pool)["x"][2:4]
    gc.collect()

    over_the_wire({"x": torch.zeros(8)}, pool=pool)

    assert view.tolist() == [2.0, 3.0]


def test_pool_lends_a_buffer_again_once_all_its_tensors_are_gone() -> None:
    pool = BufferPool()
    received = over_the_wire({"x": torch.arange(8.0), "y": torch.arange(8.0)}, pool=pool)
    address = received["x"].data_ptr()

    del received
    assert pool.num_idle == 1
    again = over_the_wire({"x": torch.arange(8.0)}, pool=pool)

    assert again["x"].data_ptr() == address
    assert pool.num_idle == 0


def test_pool_keeps_no_buffer_beyond_its_bound() -> None:
    pool = BufferPool(max_kept_bytes=1 << 16)

    del (buffer := [pool.lend((1 << 16) + 1)])[:]

    assert pool.num_idle == 0
    assert buffer == []


def test_codec_of_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="bf16, raw"):
        codec_named("zip")


@pytest.mark.parametrize("tensor", [torch.zeros(1, dtype=torch.complex64), torch.zeros(1, 1, 1, 1, 1)])
def test_tensor_that_cannot_travel_is_refused_at_the_sender(tensor: torch.Tensor) -> None:
    with pytest.raises(FrameError, match="'x'"):
        describe({"x": tensor}, Codec.RAW)
