"""How hidden states lie in the activation cache: bytes of [tokens, width] and back, token by token.

A token's bytes depend on nothing but that token, so that padding, order and neighbours change none of them.

| codec | bytes a token of width h | largest error |
| --- | --- | --- |
| raw | h numbers in the backbone's dtype | none |
| bf16 | 2 h | 2^-8 of each number |
| int8 | h + 4 | 1/254 of the token's largest number |
| int4 | h / 2 | 1/13 of the largest of those that share a scale, at least 128; of 8 of them 1/5 |

int4 keeps two numbers in a byte, so that taking them apart is a mask and a shift: of B bytes, byte j has the numbers j
and B + j. 64 bytes and their 128 numbers share a scale, one of 256 that lie a sixth of an octave apart, and it takes
no bytes of its own: the first 8 of these bytes have one of its bits each, and one number each with half as many
levels. Widths below 128 have a byte for the scale; what 128 does not divide belongs to the last scale. Behind the last
number there are zeros.
"""

from __future__ import annotations

import functools
from typing import get_args

import torch
from torch import Tensor
from torch.nn import functional

from plutino.errors import ConfigError
from plutino.state_codecs import INT4_GROUP_BYTES, INT4_UNIT, StateCodec

_LARGEST = 7
_ZERO = 8
"""A digit lies as a nibble that is so much more."""
_LARGEST_IN_STEPS = 7.5
"""The largest number of a group in steps of its scale, at most: half a step off like any other."""
_NUM_SCALE_BITS = 8
_THIN_STEP = 7 / 6
"""Even digits of numbers with half the levels stand for so many times as much: 6 is the largest of a group, too."""
SCALES = torch.tensor([2.0 ** ((code - 128) / 6) for code in range(256)])
"""By code, 4e-7 to 2e6."""
_LOWEST_BITS = 0x0101010101010101
_GATHER = 0x0102040810204080
"""Times eight bytes of one bit each: has these bits one after the other in its topmost byte."""

# Shape suffixes: T tokens, D width, B bytes of a token, G groups of a token, P bytes of a group, 2 nibbles of a byte.


def check_codec(codec: str) -> None:
    """See whether there is such a codec.

    Raises:
        ConfigError: there is not.
    """
    if codec not in get_args(StateCodec):
        raise ConfigError(
            f"activation cache codec {codec!r} is not known; choose one of {', '.join(get_args(StateCodec))}"
        )


def encode(codec: StateCodec, states_TD: Tensor) -> Tensor:
    """Bytes of hidden states: contiguous uint8 [T, bytes a token], on the states' device."""
    states_TD = states_TD.detach()
    match codec:
        case "raw":
            return states_TD.contiguous().view(torch.uint8).view(len(states_TD), -1)
        case "bf16":
            return states_TD.to(torch.bfloat16).contiguous().view(torch.uint8).view(len(states_TD), -1)
        case "int8":
            largest_T1 = states_TD.float().abs().amax(dim=1, keepdim=True)
            # By a tensor: a card multiplies by the reciprocal of a number, which rounds otherwise than a processor.
            scales_T1 = _scales(largest_T1 / torch.full_like(largest_T1, 127))
            codes_TD = (states_TD.float() / scales_T1).round().clamp(-127, 127).to(torch.int8)
            return torch.cat([scales_T1.view(torch.uint8), codes_TD.view(torch.uint8)], dim=1)
        case "int4":
            return _encode_int4(states_TD.float())


def decode(codec: StateCodec, data: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Hidden states [T, width] in ``dtype`` from what :func:`encode` gave, on the device of these bytes."""
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
    padded_T2B = functional.pad(states_TD, (0, -width % INT4_UNIT)).view(num_tokens, 2, -1)
    num_bytes, device = padded_T2B.shape[2], states_TD.device
    scales = _scales_of_codes(device)
    data_TB = torch.empty(num_tokens, num_bytes, dtype=torch.uint8, device=device)
    codes: list[Tensor] = []
    for start, end, num_groups in _spans(num_bytes):
        span_T2GP = padded_T2B[:, :, start:end].unflatten(2, (num_groups, -1))
        # The smallest scale with which nothing is cut off by more than half a step.
        largest_TG = span_T2GP.abs().amax(dim=3).amax(dim=1)
        codes_TG = torch.bucketize(largest_TG / torch.full_like(largest_TG, _LARGEST_IN_STEPS), scales).clamp_(max=255)
        codes.append(codes_TG.to(torch.uint8))
        scales_TG = scales[codes_TG]
        digits_T2GP = (span_T2GP / scales_TG[:, None, :, None]).round_().clamp_(-_LARGEST, _LARGEST)
        if num_bytes >= INT4_GROUP_BYTES:
            thin_TGb = span_T2GP[:, 0, :, :_NUM_SCALE_BITS] / (2 * _THIN_STEP * scales_TG[:, :, None])
            bits_TGb = (codes_TG[:, :, None] >> torch.arange(_NUM_SCALE_BITS, device=device)) & 1
            # Even digits: the lowest bit of the nibble is free.
            digits_T2GP[:, 0, :, :_NUM_SCALE_BITS] = thin_TGb.round_().clamp_(-3, 3).mul_(2).add_(bits_TGb)
        # Signed bytes: torch makes them of floats four times as fast.
        nibbles_T2GP = digits_T2GP.add_(_ZERO).to(torch.int8)
        data_TB[:, start:end] = (nibbles_T2GP[:, 0] | (nibbles_T2GP[:, 1] << 4)).view(torch.uint8).flatten(1)
    return data_TB if num_bytes >= INT4_GROUP_BYTES else torch.cat([codes[0], data_TB], dim=1)


def _decode_int4(data: Tensor, width: int) -> Tensor:
    num_tokens = len(data)
    num_bytes = -(-width // INT4_UNIT) * INT4_UNIT // 2
    has_own_scale = num_bytes < INT4_GROUP_BYTES
    data_TB = data[:, 1:] if has_own_scale else data
    scales = _scales_of_codes(data.device)
    numbers_T2B = torch.empty(num_tokens, 2, num_bytes, device=data.device)
    numbers_T2B[:, 0] = data_TB & _low_mask(num_bytes, data.device)
    numbers_T2B[:, 1] = data_TB >> 4
    numbers_T2B.sub_(_ZERO)
    for start, end, num_groups in _spans(num_bytes):
        numbers_T2GP = numbers_T2B[:, :, start:end].unflatten(2, (num_groups, -1))
        if has_own_scale:
            codes_TG = data[:, :1].long()
        else:
            bits_TGb = data_TB[:, start:end].unflatten(1, (num_groups, -1))[:, :, :_NUM_SCALE_BITS].contiguous()
            codes_TG = (((bits_TGb.view(torch.int64).squeeze(2) & _LOWEST_BITS) * _GATHER) >> 56) & 255
            numbers_T2GP[:, 0, :, :_NUM_SCALE_BITS] *= _THIN_STEP
        numbers_T2GP.mul_(scales[codes_TG][:, None, :, None])
    return numbers_T2B.view(num_tokens, -1)[:, :width]


@functools.lru_cache(maxsize=8)
def _scales_of_codes(device: torch.device) -> Tensor:
    return SCALES.to(device)


@functools.lru_cache(maxsize=8)
def _low_mask(num_bytes: int, device: torch.device) -> Tensor:
    """What of each byte is its low number: uint8 [B]."""
    mask_B = torch.full((num_bytes,), 15, dtype=torch.uint8)
    if num_bytes >= INT4_GROUP_BYTES:
        for start, end, num_groups in _spans(num_bytes):
            mask_B[start:end].view(num_groups, -1)[:, :_NUM_SCALE_BITS] = 14
    return mask_B.to(device)


def _spans(num_bytes: int) -> list[tuple[int, int, int]]:
    """Groups of a token's bytes: those from one to another byte are so many of equal size."""
    num_groups = max(1, num_bytes // INT4_GROUP_BYTES)
    if num_bytes in (num_groups * INT4_GROUP_BYTES, 0) or num_groups == 1:
        return [(0, num_bytes, num_groups)]
    last = (num_groups - 1) * INT4_GROUP_BYTES
    return [(0, last, num_groups - 1), (last, num_bytes, 1)]


def _scales(scales: Tensor) -> Tensor:
    """Nothing but zeros is coded with any scale."""
    return torch.where(scales == 0, torch.ones_like(scales), scales)
