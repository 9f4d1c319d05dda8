"""How hidden states lie in the activation cache: bytes of [tokens, width] and back, token by token.

A token's bytes depend on nothing but that token, so that padding, order and neighbours change none of them.

| codec | bytes a token of width h | largest error |
| --- | --- | --- |
| raw | h numbers in the backbone's dtype | none |
| bf16 | 2 h | 2^-8 of each number |
| int8 | h + 4 | 1/254 of the token's largest number |
| int4 | h / 2 + h / 32 | 1/14 of the largest of 64 neighbours, and a 256th of that |
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from plutino.errors import ConfigError

StateCodec = Literal["raw", "bf16", "int8", "int4"]

GROUP = 64
"""Numbers that share a scale in int4."""

_SCALE_BYTES = {"int8": 4, "int4": 2}

# Shape suffixes: T tokens, D width, G groups of a token.


def check_codec(codec: str) -> None:
    """See whether there is such a codec.

    Raises:
        ConfigError: there is not.
    """
    if codec not in get_args(StateCodec):
        raise ConfigError(
            f"activation cache codec {codec!r} is not known; choose one of {', '.join(get_args(StateCodec))}"
        )


def token_bytes(codec: StateCodec, width: int, dtype: torch.dtype) -> int:
    """Bytes of one token's hidden state."""
    match codec:
        case "raw":
            return width * dtype.itemsize
        case "bf16":
            return 2 * width
        case "int8":
            return width + _SCALE_BYTES["int8"]
        case "int4":
            groups = -(-width // GROUP)
            return groups * (GROUP // 2 + _SCALE_BYTES["int4"])


def encode(codec: StateCodec, states_TD: Tensor) -> Tensor:
    """Bytes of hidden states: contiguous uint8 [T, bytes a token] on the CPU."""
    states_TD = states_TD.detach().cpu()
    match codec:
        case "raw":
            return states_TD.contiguous().view(torch.uint8).view(len(states_TD), -1)
        case "bf16":
            return states_TD.to(torch.bfloat16).contiguous().view(torch.uint8).view(len(states_TD), -1)
        case "int8":
            scales_T1 = _scales(states_TD.float().abs().amax(dim=1, keepdim=True) / 127)
            codes_TD = (states_TD.float() / scales_T1).round().clamp(-127, 127).to(torch.int8)
            return torch.cat([scales_T1.view(torch.uint8), codes_TD.view(torch.uint8)], dim=1)
        case "int4":
            return _encode_int4(states_TD.float())


def decode(codec: StateCodec, data: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Hidden states [T, width] in ``dtype`` from what :func:`encode` gave."""
    num_tokens = len(data)
    match codec:
        case "raw":
            return data.contiguous().view(dtype).view(num_tokens, width)
        case "bf16":
            return data.contiguous().view(torch.bfloat16).view(num_tokens, width).to(dtype)
        case "int8":
            scales_T1 = data[:, :4].contiguous().view(torch.float32)
            return (data[:, 4:].view(torch.int8).float() * scales_T1).to(dtype)
        case "int4":
            return _decode_int4(data, width).to(dtype)


def _encode_int4(states_TD: Tensor) -> Tensor:
    num_tokens, width = states_TD.shape
    padded = functional.pad(states_TD, (0, -width % GROUP)).view(num_tokens, -1, GROUP)
    scales_TG1 = _scales((padded.abs().amax(dim=2, keepdim=True) / 7).to(torch.bfloat16).float())
    codes = (padded / scales_TG1).round().clamp(-7, 7).to(torch.int8) + 8
    codes = codes.view(num_tokens, -1, 2).to(torch.uint8)
    packed = codes[..., 0] | (codes[..., 1] << 4)
    scales = scales_TG1.squeeze(2).to(torch.bfloat16).contiguous().view(torch.uint8)
    return torch.cat([scales, packed], dim=1)


def _decode_int4(data: Tensor, width: int) -> Tensor:
    num_tokens, groups = len(data), -(-width // GROUP)
    scale_bytes = groups * _SCALE_BYTES["int4"]
    scales_TG = data[:, :scale_bytes].contiguous().view(torch.bfloat16).float()
    packed = data[:, scale_bytes:]
    codes = torch.stack([packed & 15, packed >> 4], dim=2).view(num_tokens, groups, GROUP).float() - 8
    return (codes * scales_TG.unsqueeze(2)).view(num_tokens, -1)[:, :width]


def _scales(scales: Tensor) -> Tensor:
    """Nothing but zeros is coded with any scale."""
    return torch.where(scales == 0, torch.ones_like(scales), scales)
