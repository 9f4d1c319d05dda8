"""Codecs of the activation cache: sizes, error bounds, and that a token's bytes depend on that token alone."""

from __future__ import annotations

import pytest
import torch

from edge_node.activation_cache.codecs import GROUP, check_codec, decode, encode, token_bytes
from plutino.errors import ConfigError

CODECS = ("raw", "bf16", "int8", "int4")
WIDTHS = (32, 64, 200)


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

    assert data.shape == (len(values), token_bytes(codec, width, dtype))
    assert torch.equal(encode(codec, values[5:9]), data[5:9])
    back = decode(codec, data, width, dtype)
    assert back.dtype == dtype
    assert back.shape == values.shape
    assert bool((back[3] == 0).all())


@pytest.mark.parametrize("width", WIDTHS)
def test_errors_stay_below_what_each_codec_promises(width):
    values = states(width)
    largest = values.abs().amax(dim=1, keepdim=True)
    groups = torch.nn.functional.pad(values, (0, -width % GROUP)).view(len(values), -1, GROUP)
    of_group = groups.abs().amax(dim=2, keepdim=True).expand_as(groups).reshape(len(values), -1)[:, :width]
    bounds = {
        "raw": torch.zeros_like(values),
        "bf16": values.abs() * 2.0**-8,
        "int8": (largest / 254).expand_as(values),
        # The scale is rounded to bf16, which moves it by up to a 256th.
        "int4": of_group / 14 * (1 + 2.0**-7),
    }

    for codec in CODECS:
        error = (decode(codec, encode(codec, values), width, torch.float32) - values).abs()
        assert bool((error <= bounds[codec] * (1 + 1e-5)).all()), codec
    assert token_bytes("int4", 4096, torch.float32) <= 0.54 * 4096


def test_unknown_codec_is_refused_with_the_known_ones():
    check_codec("int4")
    with pytest.raises(ConfigError, match="choose one of raw, bf16, int8, int4"):
        check_codec("zip")
