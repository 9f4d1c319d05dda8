"""nf4: 4-bit NormalFloat in blocks of 64 with doubly quantised constants, as QLoRA has it (arXiv:2305.14314).

Bytes are laid out as bitsandbytes lays them out, so that packed weights go either way, and dequantise to the same bits:
level times block constant in fp32, rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from edge_node.quantize.base import PackedTensor, check_finite, check_weight
from edge_node.quantize.fused import nf4_launch
from edge_node.quantize.native import nf4_kernel
from edge_node.quantize.nf4_levels import bounds as level_bounds
from edge_node.quantize.nf4_levels import constant_levels, pairs
from edge_node.quantize.workspace import scratch_elements, workspace
from plutino.errors import QuantizationError

BLOCK = 64
"""Weights that share a constant; blocks run on over row ends."""
NESTED_BLOCK = 256
"""Block constants that share an fp32 constant of their own."""


@dataclass(frozen=True, slots=True)
class Nf4:
    """W[n] = LEVELS[code[n]] * absmax[n // 64], where absmax is itself held in 8 bits."""

    name: Literal["nf4"] = "nf4"
    has_native: bool = True
    """Whether bitsandbytes' kernel, or ours on a card, is used where it gives the same bits; it only saves time."""

    def check(self, out_features: int, in_features: int) -> None:
        """Two weights share a byte."""
        if out_features < 1 or in_features < 1 or out_features * in_features % 2:
            raise QuantizationError(
                f"nf4 holds two weights a byte, so it cannot hold a [{out_features}, {in_features}] weight of "
                f"{out_features * in_features} elements; choose int8"
            )

    def layout(self, out_features: int, in_features: int) -> dict[str, PackedTensor]:
        """4 + 8/64 + 32/(64*256) = 4.127 bits a weight, and 32 bits a matrix."""
        num_weights = out_features * in_features
        num_blocks = -(-num_weights // BLOCK)
        return {
            "codes": PackedTensor(torch.uint8, (num_weights // 2,)),
            "absmax": PackedTensor(torch.uint8, (num_blocks,)),
            "nested_absmax": PackedTensor(torch.float32, (-(-num_blocks // NESTED_BLOCK),)),
            "nested_offset": PackedTensor(torch.float32, ()),
        }

    def row_multiple(self, in_features: int) -> int:
        """Rows until one starts with a block."""
        return BLOCK // math.gcd(in_features, BLOCK)

    @torch.no_grad()
    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """Quantise to the nearest level of each block's range. The first weight of a pair is in the high half-byte."""
        check_weight(self, weight)
        flat = weight.reshape(-1)
        num_weights = flat.numel()
        device = flat.device
        bounds = [bound.item() for bound in level_bounds()]
        codes = torch.empty(num_weights // 2, dtype=torch.uint8, device=device)
        absmax = torch.empty(-(-num_weights // BLOCK), dtype=torch.float32, device=device)
        piece = scratch_elements(device)
        for start in range(0, num_weights, piece):
            end = min(start + piece, num_weights)
            values = flat[start:end].float()
            tail = -values.numel() % BLOCK
            blocks = torch.nn.functional.pad(values, (0, tail)).view(-1, BLOCK)
            largest = blocks.abs().amax(dim=1)
            check_finite(weight, largest)
            absmax[start // BLOCK : start // BLOCK + len(largest)] = largest
            scaled = (blocks * (1 / largest.clamp(min=1e-38)).unsqueeze(1)).clamp_(-1, 1)
            nearest = _count_below(scaled.view(-1)[: end - start], bounds)
            torch.bitwise_or(nearest[0::2] << 4, nearest[1::2], out=codes[start // 2 : end // 2])
        # In fp64, because a fp32 sum depends on the number of threads that form it, and packed bytes must not.
        offset = absmax.double().mean().float()
        nested_codes, nested_absmax = _pack_constants(absmax - offset)
        return {"codes": codes, "absmax": nested_codes, "nested_absmax": nested_absmax, "nested_offset": offset}

    def unpack(self, packed: Mapping[str, Tensor], out: Tensor, *, start_row: int = 0) -> Tensor:
        """Dequantise rows from ``start_row`` on; see :class:`edge_node.quantize.base.Scheme`."""
        if out.is_cuda and self.has_native:
            launch = nf4_launch(out.dtype, out.device, _unpack_without_kernel)
            if launch is not None:
                launch(packed, out, start_row)
                return out
        in_features = out.shape[1]
        start = start_row * in_features
        assert start % BLOCK == 0, f"row {start_row} of {in_features} weights starts inside a block"
        first_block, last_block = start // BLOCK, -(-(start + out.numel()) // BLOCK)
        absmax = _unpack_constants(packed, first_block, last_block)
        codes = packed["codes"][start // 2 : start // 2 + out.numel() // 2]
        kernel = nf4_kernel(out.dtype, out.device, unpack_in_torch) if self.has_native else None
        if kernel is not None and out.numel() % BLOCK == 0:
            kernel(codes, absmax, out)
        else:
            unpack_in_torch(codes, absmax, out)
        return out


def _unpack_without_kernel(packed: Mapping[str, Tensor], out: Tensor, *, start_row: int = 0) -> Tensor:
    """What a card's kernel is held against; one function, by which what came of that is remembered."""
    return Nf4(has_native=False).unpack(packed, out, start_row=start_row)


def unpack_in_torch(codes: Tensor, absmax: Tensor, out: Tensor) -> None:
    """Dequantise ``out`` of N elements from codes [N / 2] and fp32 block constants [ceil(N / 64)], with torch alone.

    One lookup gives both weights of a byte: a table of 256 pairs of fp32, which torch sees as one fp64 each. Pieces are
    small enough to stay in a core's cache from the lookup to the rounding.
    """
    table = pairs(out.device)
    out = out.view(-1)
    piece = scratch_elements(out.device)
    for start in range(0, out.numel(), piece):
        num_weights = min(piece, out.numel() - start)
        num_blocks = -(-num_weights // BLOCK)
        piece_of_out = out[start : start + num_weights]
        # Whole blocks of fp32 are formed where they are wanted.
        is_direct = out.dtype == torch.float32 and num_weights % BLOCK == 0 and piece_of_out.data_ptr() % 8 == 0
        indices = workspace("indices", num_weights // 2, torch.int32, out.device)
        values = piece_of_out if is_direct else workspace("values", num_blocks * BLOCK, torch.float32, out.device)
        indices.copy_(codes[start // 2 : (start + num_weights) // 2])
        torch.index_select(table, 0, indices, out=values[:num_weights].view(torch.float64))
        values.view(-1, BLOCK).mul_(absmax[start // BLOCK : start // BLOCK + num_blocks].unsqueeze(1))
        if not is_direct:
            piece_of_out.copy_(values[:num_weights])


def _count_below(values: Tensor, bounds: Sequence[float]) -> Tensor:
    """How many bounds lie below each value, uint8: torch.bucketize, in a tenth of its time on CPU.

    Counted in fp32, because torch vectorises comparisons there whose result is not boolean.
    """
    counts, is_above = torch.zeros_like(values), torch.empty_like(values)
    for bound in bounds:
        counts += torch.gt(values, bound, out=is_above)
    return counts.to(torch.int8).view(torch.uint8)


def _pack_constants(values: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [N] and fp32 constants [ceil(N / 256)] of block constants less their mean."""
    levels = constant_levels(values.device)
    blocks = torch.nn.functional.pad(values, (0, -values.numel() % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    largest = blocks.abs().amax(dim=1)
    scaled = blocks / torch.where(largest > 0, largest, 1).unsqueeze(1)
    upper = torch.bucketize(scaled, levels).clamp_(1, len(levels) - 1)
    lower = upper - 1
    # Of two levels equally near the lower one.
    codes = torch.where(levels[upper] - scaled < scaled - levels[lower], upper, lower)
    return codes.view(-1)[: values.numel()].to(torch.uint8), largest


def _unpack_constants(packed: Mapping[str, Tensor], first_block: int, last_block: int) -> Tensor:
    """The fp32 constants of blocks [first_block, last_block)."""
    codes = packed["absmax"][first_block:last_block]
    first, last = first_block // NESTED_BLOCK, -(-last_block // NESTED_BLOCK)
    scales, skipped = packed["nested_absmax"][first:last], first_block - first * NESTED_BLOCK
    values = constant_levels(codes.device).index_select(0, codes.int())
    if skipped == 0 and len(values) % NESTED_BLOCK == 0:
        values.view(-1, NESTED_BLOCK).mul_(scales.unsqueeze(1))
    else:
        values.mul_(scales.repeat_interleave(NESTED_BLOCK)[skipped : skipped + len(codes)])
    return values.add_(packed["nested_offset"])
