"""The values that nf4's codes stand for, and those of the codes of its block constants: tables, by device."""

from __future__ import annotations

import functools
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The values of the 16 codes: quantiles of the normal distribution, the paper's appendix E."""


@functools.cache
def levels(device: torch.device) -> Tensor:
    """The values of the codes, fp32 [16]."""
    with torch.inference_mode(False):
        return torch.tensor(LEVELS, dtype=torch.float32).to(device)


@functools.cache
def pairs(device: torch.device) -> Tensor:
    """Both values of a byte as the bytes of one fp64, [256]."""
    with torch.inference_mode(False):
        byte = torch.arange(256)
        values = torch.tensor(LEVELS, dtype=torch.float32)
        return torch.stack([values[byte >> 4], values[byte & 15]], dim=1).view(torch.float64).flatten().to(device)


@functools.cache
def bounds() -> Tensor:
    """Where one level ends and the next begins, fp32 [15]."""
    values = torch.tensor(LEVELS, dtype=torch.float32)
    return (values[:-1] + values[1:]) / 2


@functools.cache
def constant_levels(device: torch.device) -> Tensor:
    """Values of the codes of block constants, fp32 [256], rising: the dynamic type of Dettmers (arXiv:1511.04561).

    Seven decades below 1, the i-th lowest cut into 2^i equal parts whose middles are levels, with both signs; 0 and 1.
    """
    f32 = np.float32
    values = [0.0, 1.0]
    low = f32(0.1)
    for decade in range(7):
        parts = 2**decade
        step = (f32(1) - low) / f32(parts)
        # The edges as a fused multiply-add gives them, from the nearer end: products in fp64 are exact. bitsandbytes'
        # own table comes out of torch.linspace, whose bits depend on the processor.
        edges = [
            f32(float(low) + float(step) * part) if part < (parts + 1) // 2 else f32(1 - float(step) * (parts - part))
            for part in range(parts + 1)
        ]
        scale = f32(10.0 ** (decade - 6))
        middles = [float((left + right) / f32(2) * scale) for left, right in pairwise(edges)]
        values += [*middles, *(-middle for middle in middles)]
    with torch.inference_mode(False):
        return torch.tensor(sorted(values), dtype=torch.float32).to(device)
