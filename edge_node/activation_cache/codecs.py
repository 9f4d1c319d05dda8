"""How hidden states lie in the activation cache: bytes of [tokens, width] and back, token by token.

A token's bytes depend on nothing but that token, so that padding, order and neighbours change none of them.

| codec | bytes a token of width h | largest error |
| --- | --- | --- |
| raw | h numbers in the backbone's dtype | none |
| bf16 | 2 h | 2^-8 of each number |
| int8 | h + 4 | 1/254 of the token's largest number |
| int4 | h / 2 | 1/12 of the largest of those that share a scale, at least 128 |

int4 has 15 levels, and 15^16 is less than 2^63: 16 numbers are the digits of one in base 15, and the topmost bits of
8 such words are their scale, one of 256 that lie a sixth of an octave apart: it takes no bytes of its own. Widths
below 128 have a byte for it; what 128 does not divide belongs to the last scale. Of W words the first has the numbers
0, W, 2 W, ..., so that what is computed runs along memory; behind the last number there are zeros.
"""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor
from torch.nn import functional

from plutino.errors import ConfigError
from plutino.state_codecs import INT4_GROUP_WORDS, INT4_WORD, StateCodec

_LEVELS = 15
_HALF = _LEVELS // 2
_CHUNK = _LEVELS**4
"""Four digits are a number that fp32 holds exactly; they are put together and taken apart as floats, which is quick."""
_TOP_BIT = -(1 << 63)
SCALES = torch.tensor([2.0 ** ((code - 128) / 6) for code in range(256)])
"""By code, 4e-7 to 2e6: seven times that is the largest number that is not cut off."""
_NUM_CHUNKS = INT4_WORD // 4

# Shape suffixes: T tokens, D width, W words of a token, G groups of a token, P places of a word, C chunks of a word.


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
    padded_TPW = functional.pad(states_TD, (0, -width % INT4_WORD)).view(num_tokens, INT4_WORD, -1)
    group_of_word = _group_of_word(padded_TPW.shape[2])
    num_groups = int(group_of_word[-1]) + 1
    largest_TW = padded_TPW.abs().amax(dim=1)
    largest_TG = torch.stack([largest_TW[:, group_of_word == group].amax(dim=1) for group in range(num_groups)], dim=1)
    # The smallest scale with which nothing is cut off.
    codes_TG = torch.bucketize(largest_TG / _HALF, SCALES).clamp(max=255)
    scales_T1W = SCALES[codes_TG][:, group_of_word].unsqueeze(1)
    digits_TPW = (padded_TPW / scales_T1W).round_().clamp_(-_HALF, _HALF).add_(_HALF)
    chunks_TCW = torch.zeros(num_tokens, _NUM_CHUNKS, padded_TPW.shape[2])
    words_TW = torch.zeros(num_tokens, padded_TPW.shape[2], dtype=torch.int64)
    for place in reversed(range(4)):
        chunks_TCW = chunks_TCW.mul_(_LEVELS).add_(digits_TPW.view(num_tokens, _NUM_CHUNKS, 4, -1)[:, :, place])
    for chunk in reversed(range(_NUM_CHUNKS)):
        words_TW = words_TW.mul_(_CHUNK).add_(chunks_TCW[:, chunk].long())
    if len(group_of_word) < INT4_GROUP_WORDS:
        return torch.cat([codes_TG.to(torch.uint8), words_TW.view(torch.uint8)], dim=1)
    bits_TGb = (codes_TG.unsqueeze(2) >> torch.arange(INT4_GROUP_WORDS)) & 1
    words_TW[:, : num_groups * INT4_GROUP_WORDS] |= bits_TGb.flatten(1) * _TOP_BIT
    return words_TW.view(torch.uint8)


def _decode_int4(data: Tensor, width: int) -> Tensor:
    num_tokens, num_words = len(data), -(-width // INT4_WORD)
    group_of_word = _group_of_word(num_words)
    if num_words < INT4_GROUP_WORDS:
        codes_TG = data[:, :1].long()
        words_TW = data[:, 1:].contiguous().view(torch.int64)
    else:
        words_TW = data.contiguous().view(torch.int64)
        num_groups = int(group_of_word[-1]) + 1
        bits_TGb = (words_TW[:, : num_groups * INT4_GROUP_WORDS] < 0).view(num_tokens, num_groups, -1).long()
        codes_TG = (bits_TGb << torch.arange(INT4_GROUP_WORDS)).sum(dim=2)
        words_TW = words_TW & ~_TOP_BIT
    chunks_TCW = torch.empty(num_tokens, _NUM_CHUNKS, num_words)
    for chunk in range(_NUM_CHUNKS):
        rest_TW = torch.div(words_TW, _CHUNK, rounding_mode="floor")
        chunks_TCW[:, chunk] = words_TW - rest_TW * _CHUNK
        words_TW = rest_TW
    digits_TC4W = torch.empty(num_tokens, _NUM_CHUNKS, 4, num_words)
    for place in range(4):
        # Half a unit keeps the quotient away from whole numbers, so that its rounding does not matter.
        rest_TCW = ((chunks_TCW + 0.5) * (1 / _LEVELS)).floor_()
        digits_TC4W[:, :, place] = chunks_TCW.sub_(rest_TCW, alpha=_LEVELS)
        chunks_TCW = rest_TCW
    scales_T1W = SCALES[codes_TG][:, group_of_word].unsqueeze(1)
    numbers_TPW = digits_TC4W.flatten(1, 2).sub_(_HALF).mul_(scales_T1W)
    return numbers_TPW.view(num_tokens, -1)[:, :width]


def _group_of_word(num_words: int) -> Tensor:
    return (
        torch.arange(num_words)
        .div(INT4_GROUP_WORDS, rounding_mode="floor")
        .clamp(max=max(1, num_words // INT4_GROUP_WORDS) - 1)
    )


def _scales(scales: Tensor) -> Tensor:
    """Nothing but zeros is coded with any scale."""
    return torch.where(scales == 0, torch.ones_like(scales), scales)
