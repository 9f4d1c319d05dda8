# mypy: ignore-errors
"""The kernels of :mod:`edge_node.quantize.fused` in Triton's language: needs triton, which most devices lack.

Weights are products in fp32, rounded once, as torch's operations have it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def unpack_nf4(
    codes, absmax, nested_absmax, nested_offset, constants, levels, out, num_bytes, first_block, SIZE: tl.constexpr
):
    """SIZE bytes of codes [num_bytes] to weights [2 num_bytes]; the first of a pair is in the high half-byte.

    Codes begin with block ``first_block`` of the matrix, absmax and nested_absmax with the matrix.
    """
    first = tl.program_id(0).to(tl.int64) * SIZE
    at = first + tl.arange(0, SIZE)
    is_there = at < num_bytes
    block = first_block + at // 32
    constant = tl.load(constants + tl.load(absmax + block, mask=is_there, other=0).to(tl.int32))
    nested = tl.load(nested_absmax + block // 256, mask=is_there, other=0.0)
    scale = constant * nested + tl.load(nested_offset)
    byte = tl.load(codes + at, mask=is_there, other=0).to(tl.int32)
    high = tl.load(levels + (byte >> 4)) * scale
    low = tl.load(levels + (byte & 15)) * scale
    both = 2 * first + tl.arange(0, 2 * SIZE)
    tl.store(out + both, tl.interleave(high, low).to(out.dtype.element_ty), mask=both < 2 * num_bytes)


@triton.jit
def unpack_int4(codes, scales, zeros, out, half, SIZE: tl.constexpr):
    """SIZE bytes of a row's codes [half] to weights of both halves of the row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    is_there = at < half
    byte = tl.load(codes + row * half + at, mask=is_there, other=0).to(tl.int32)
    for part in tl.static_range(2):
        column = at + part * half
        group = row * (half // 64) + column // 128
        code = (byte >> (4 * part)) & 15
        zero = tl.load(zeros + group, mask=is_there, other=0).to(tl.int32)
        scale = tl.load(scales + group, mask=is_there, other=0.0).to(tl.float32)
        value = (code - zero).to(tl.float32) * scale
        tl.store(out + 2 * row * half + column, value.to(out.dtype.element_ty), mask=is_there)
