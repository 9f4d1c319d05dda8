"""int4: 4-bit integers in groups of 128 inputs, each with a scale and a zero point.

Asymmetric, because groups of real weights are lopsided: on weights with heavy tails (Student's t, 5 degrees of freedom)
the relative error is 0.134, against 0.151 of symmetric codes whose largest magnitude is -8. For a Gaussian it is 0.101
against 0.103. Shrinking a group's range where that lowers its squared error gives 0.128 and 0.096.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from edge_node.quantize.base import PackedTensor, check_finite, check_weight, row_tiles
from edge_node.quantize.fused import int4_launch
from edge_node.quantize.workspace import scratch_elements, workspace
from plutino.errors import QuantizationError

GROUP = 128
"""Inputs of one output channel that share a scale and a zero point."""
_LARGEST_CODE = 15
_SHRINKS = (1.0, 0.9, 0.8)
"""Parts of a group's range that are tried; more of them gain less than 1 % of the error."""


@dataclass(frozen=True, slots=True)
class Int4:
    """W[o, i] = (code[o, i] - zeros[o, i // 128]) * scales[o, i // 128].

    A row's byte j holds weight j in its low half and weight j + in_features / 2 in its high one: both halves of a row
    then come out of operations on long runs of bytes, which are twice as fast as looking pairs up.
    """

    name: Literal["int4"] = "int4"
    has_native: bool = True
    """Whether our kernel is used on a card where it gives the same bits; it only saves time."""

    def check(self, out_features: int, in_features: int) -> None:
        """Groups must divide rows."""
        if out_features < 1 or in_features < 1 or in_features % GROUP:
            raise QuantizationError(
                f"int4 groups {GROUP} inputs, which does not divide the {in_features} inputs of a "
                f"[{out_features}, {in_features}] weight; choose nf4 or int8"
            )

    def layout(self, out_features: int, in_features: int) -> dict[str, PackedTensor]:
        """4 + 24/128 = 4.19 bits a weight."""
        groups = (out_features, in_features // GROUP)
        return {
            "codes": PackedTensor(torch.uint8, (out_features, in_features // 2)),
            "scales": PackedTensor(torch.bfloat16, groups),
            "zeros": PackedTensor(torch.uint8, groups),
        }

    def row_multiple(self, in_features: int) -> int:
        """Rows are independent."""
        return 1

    @torch.no_grad()
    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """Quantise by group, with that of a few ranges that gives the smallest squared error."""
        check_weight(self, weight)
        out_features, in_features = weight.shape
        packed = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, device=weight.device)
            for name, tensor in self.layout(out_features, in_features).items()
        }
        for start, end in row_tiles(
            out_features, in_features, multiple=1, max_elements=scratch_elements(weight.device)
        ):
            groups = weight[start:end].float().reshape(-1, GROUP)
            check_finite(weight, groups.abs().amax(dim=1))
            codes, scales, zeros = _pack_groups(groups)
            low, high = codes.view(end - start, 2, in_features // 2).unbind(1)
            torch.bitwise_or(low, high << 4, out=packed["codes"][start:end])
            packed["scales"][start:end] = scales.view(end - start, -1)
            packed["zeros"][start:end] = zeros.view(end - start, -1)
        return packed

    def unpack(self, packed: Mapping[str, Tensor], out: Tensor, *, start_row: int = 0) -> Tensor:
        """Dequantise rows from ``start_row`` on; see :class:`edge_node.quantize.base.Scheme`."""
        if out.is_cuda and self.has_native:
            launch = int4_launch(out.dtype, out.device, _unpack_without_kernel)
            if launch is not None:
                launch(packed, out, start_row)
                return out
        in_features = out.shape[1]
        # All of (code - zero) is exact in bf16, so that the product is the only rounding; fp16 lacks bf16's range.
        dtype = torch.float32 if out.dtype == torch.float16 else out.dtype
        for start, end in row_tiles(len(out), in_features, multiple=1, max_elements=scratch_elements(out.device)):
            rows = slice(start_row + start, start_row + end)
            codes = packed["codes"][rows]
            halves = workspace("halves", codes.numel(), torch.uint8, out.device).view(codes.shape)
            piece = out[start:end] if dtype == out.dtype else torch.empty_like(out[start:end], dtype=dtype)
            piece[:, : in_features // 2].copy_(torch.bitwise_and(codes, _LARGEST_CODE, out=halves))
            piece[:, in_features // 2 :].copy_(torch.bitwise_right_shift(codes, 4, out=halves))
            groups = piece.view(end - start, -1, GROUP)
            groups.sub_(packed["zeros"][rows].to(dtype).unsqueeze(2))
            groups.mul_(packed["scales"][rows].to(dtype).unsqueeze(2))
            if piece.dtype != out.dtype:
                out[start:end] = piece
        return out


def _unpack_without_kernel(packed: Mapping[str, Tensor], out: Tensor, *, start_row: int = 0) -> Tensor:
    """What a card's kernel is held against; one function, by which what came of that is remembered."""
    return Int4(has_native=False).unpack(packed, out, start_row=start_row)


def _pack_groups(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 [N, 128], scales bf16 [N, 1] and zero points uint8 [N, 1] of fp32 groups [N, 128]."""
    # A range with 0 in it, so that 0 is a zero point's value and the zero point a code. Not aminmax, which is ten times
    # slower on CPU than both.
    low, high = groups.amin(dim=1, keepdim=True).clamp_(max=0), groups.amax(dim=1, keepdim=True).clamp_(min=0)
    best: tuple[Tensor, Tensor, Tensor] | None = None
    least: Tensor | None = None
    for shrink in _SHRINKS:
        scales = ((high - low) * (shrink / _LARGEST_CODE)).bfloat16()
        divisors = torch.where(scales > 0, scales, 1).float()
        zeros = (low * -shrink / divisors).round_().clamp_(0, _LARGEST_CODE)
        codes = (groups / divisors).add_(zeros).round_().clamp_(0, _LARGEST_CODE)
        errors = (codes - zeros).mul_(scales.float()).sub_(groups).square_().sum(dim=1, keepdim=True)
        found = (codes.to(torch.uint8), scales, zeros.to(torch.uint8))
        if best is None or least is None:
            best, least = found, errors
            continue
        is_better = errors < least
        best = (
            torch.where(is_better, found[0], best[0]),
            torch.where(is_better, found[1], best[1]),
            torch.where(is_better, found[2], best[2]),
        )
        least = torch.minimum(errors, least)
    assert best is not None
    return best
