"""Codecs of the activation cache: sizes, error bounds, and that a token's bytes depend on that token alone."""

from __future__ import annotations

import pytest
import torch

from edge_node.activation_cache.codecs import check_codec, decode, encode
from plutino.errors import ConfigError
from plutino.state_codecs import token_bytes

CODECS = ("raw", "bf16", "int8", "int4")
WIDTHS = (32, 200, 256, 288)


def states(width, num_tokens=23):
    """Heavy-tailed as hidden states are: some numbers of every token are a hundred times the others."""
    generator = torch.Generator().manual_seed(width)
    values = torch.randn(num_tokens, width, generator=generator)
    values[:, :: width // 8] *= 100
    values[3] = 0
    return values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("codec", CODECS)
def test_encoded_tokens_have_the_promised_size_and_are_coded_alone(codec, width, dtype):
    values = states(width).to(dtype)

    data = encode(codec, values)

    assert data.shape == (len(values), token_bytes(codec, width, dtype.itemsize))
    assert torch.equal(encode(codec, values[5:9]), data[5:9])
    back = decode(codec, data, width, dtype)
    assert back.dtype == dtype
    assert back.shape == values.shape
    assert bool((back[3] == 0).all())


@pytest.mark.parametrize("width", WIDTHS)
def test_errors_stay_below_what_each_codec_promises(width):
    values = states(width)
    largest = values.abs().amax(dim=1, keepdim=True)
    # Number n of B bytes is in byte n % B, and 64 bytes share a scale; the last scale has what is left as well.
    num_bytes = -(-width // 16) * 8
    num_scales = max(1, num_bytes // 64)
    byte_of = torch.arange(width) % num_bytes
    scale_of = (byte_of // 64).clamp(max=num_scales - 1)
    of_group = torch.zeros_like(values)
    for scale in scale_of.unique():
        of_group[:, scale_of == scale] = values[:, scale_of == scale].abs().amax(dim=1, keepdim=True)
    # The first eight low nibbles of a group have a bit of its scale each.
    is_thin = (byte_of - 64 * scale_of < 8) & (torch.arange(width) < num_bytes) & (num_bytes >= 64)
    bounds = {
        "raw": torch.zeros_like(values),
        "bf16": values.abs() * 2.0**-8,
        "int8": (largest / 254).expand_as(values),
        "int4": of_group / 15 * 2 ** (1 / 6) * (1 + 4 / 3 * is_thin.float()),
    }

    for codec in CODECS:
        error = (decode(codec, encode(codec, values), width, torch.float32) - values).abs()
        assert bool((error <= bounds[codec] * (1 + 1e-5)).all()), codec


@pytest.mark.parametrize("width", [128, 288, 384, 512, 768, 1024, 4096])
def test_int4_takes_half_a_byte_a_number_with_all_its_scales(width):
    values = states(width, num_tokens=7)

    assert encode("int4", values).numel() == 7 * width // 2
    assert token_bytes("int4", width, 4) == width // 2


def test_int4_survives_the_smallest_and_the_largest_states():
    values = torch.stack([torch.full((256,), 10.0**power) for power in range(-5, 8)])

    found = decode("int4", encode("int4", values), 256, torch.float32)

    assert bool(((found - values).abs() <= values / 6 * 2 ** (1 / 6)).all())


def test_unknown_codec_is_refused_with_the_known_ones():
    check_codec("int4")
    with pytest.raises(ConfigError, match="choose one of raw, bf16, int8, int4"):
        check_codec("zip")
