"""int8: one signed byte a weight and one scale an output channel (LLM.int8() without its outliers).

Symmetric absolute-maximum quantisation by row, as in Dettmers et al. 2022 (arXiv:2208.07339), equation 1. Scales are
bf16: codes are exact in bf16 too, so that a bf16 weight is one exact conversion and one product, rounded once, which
is several times faster than going through fp32. The coarser scale costs less than a code's own rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from edge_node.quantize.base import (
    PackedTensor,
    check_finite,
    check_weight,
    row_tiles,
    scale_groups,
)
from edge_node.quantize.workspace import scratch_elements
from plutino.errors import QuantizationError

_LARGEST_CODE = 127


@dataclass(frozen=True, slots=True)
class Int8:
    """W[o, i] = codes[o, i] * scales[o], with codes in [-127, 127]."""

    name: Literal["int8"] = "int8"

    def check(self, out_features: int, in_features: int) -> None:
        """Every matrix fits that has elements."""
        if out_features < 1 or in_features < 1:
            raise QuantizationError(f"a [{out_features}, {in_features}] weight has no elements; leave it unpacked")

    def layout(self, out_features: int, in_features: int) -> dict[str, PackedTensor]:
        """8 bits a weight and 16 an output channel."""
        return {
            "codes": PackedTensor(torch.int8, (out_features, in_features)),
            "scales": PackedTensor(torch.bfloat16, (out_features,)),
        }

    def row_multiple(self, in_features: int) -> int:
        """Rows are independent."""
        return 1

    @torch.no_grad()
    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """Quantise by row; a row of zeros has scale 0."""
        check_weight(self, weight)
        out_features, in_features = weight.shape
        codes = torch.empty(out_features, in_features, dtype=torch.int8, device=weight.device)
        scales = torch.empty(out_features, dtype=torch.bfloat16, device=weight.device)
        for start, end in row_tiles(
            out_features, in_features, multiple=1, max_elements=scratch_elements(weight.device)
        ):
            rows = weight[start:end].to(torch.float32, copy=True)
            largest = rows.abs().amax(dim=1)
            check_finite(weight, largest)
            scales[start:end] = largest / _LARGEST_CODE
            # By the rounded scale, and 1 where even a row that is not all zeros is too small to have one.
            divisors = torch.where(scales[start:end] > 0, scales[start:end], 1).float().unsqueeze(1)
            codes[start:end] = rows.div_(divisors).round_().clamp_(-_LARGEST_CODE, _LARGEST_CODE)
        return {"codes": codes, "scales": scales}

    def unpack(self, packed: Mapping[str, Tensor], out: Tensor, *, start_row: int = 0) -> Tensor:
        """Dequantise rows from ``start_row`` on; see :class:`edge_node.quantize.base.Scheme`."""
        codes, scales = (packed[name][start_row : start_row + len(out)] for name in ("codes", "scales"))
        scale_groups(codes, scales.unsqueeze(1), out)
        return out

    def row_scales(self, packed: Mapping[str, Tensor]) -> Tensor:
        """The scales; see :class:`edge_node.quantize.base.RowScaled`."""
        return packed["scales"]

    def unpack_codes(self, packed: Mapping[str, Tensor], out: Tensor, *, start_row: int = 0) -> Tensor:
        """The codes of rows from ``start_row`` on; see :class:`edge_node.quantize.base.RowScaled`."""
        return out.copy_(packed["codes"][start_row : start_row + len(out)])
