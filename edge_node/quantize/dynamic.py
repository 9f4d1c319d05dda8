"""int8 products without a gradient: activations are quantised too, by token, and integers are multiplied.

For methods that send no gradient through the backbone, on layers that int8 holds (LLM.int8() without outliers, Dettmers
et al. 2022, arXiv:2208.07339). Twice bf16's rate on paper; but activations must be read, scaled and rounded, and sums
brought back, so that whether it pays depends on processor and shape: :func:`measure_forward` tells. Its values differ
from those of the dequantised weight, so the answer belongs into a job's numerics record.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from edge_node.quantize.base import row_tiles
from edge_node.quantize.int8 import Int8
from edge_node.quantize.linear import QuantLinear
from edge_node.quantize.workspace import scratch_elements, workspace
from plutino.errors import QuantizationError

ForwardPath = Literal["dequantised", "dynamic"]

_LARGEST_CODE = 127
_LEAST_CUDA_ROWS = 17
_CUDA_MULTIPLE = 8
"""What torch._int_mm asks for on CUDA."""


@dataclass(frozen=True, slots=True)
class ForwardTimes:
    """Seconds of one forward product at one shape, the lowest of several turns."""

    dequantised_s: float
    dynamic_s: float

    @property
    def faster(self) -> ForwardPath:
        """The path to take."""
        return "dynamic" if self.dynamic_s < self.dequantised_s else "dequantised"


@torch.no_grad()
def forward_only(layer: QuantLinear, x: Tensor) -> Tensor:
    """[..., in_features] to [..., out_features] in the dtype of ``x``, through integers; it has no gradient.

    Raises:
        QuantizationError: the layer's scheme is not int8, its shape cannot be multiplied on this device, or ``x`` wants
            a gradient, which would get lost without a word.
    """
    if not isinstance(layer.scheme, Int8):
        raise QuantizationError(f"integer products need int8 weights, not {layer.scheme.name}; set quantization: int8")
    if x.requires_grad:
        raise QuantizationError("integer products have no gradient, but the input wants one; use the layer itself")
    if x.is_cuda and (layer.in_features % _CUDA_MULTIPLE or layer.out_features % _CUDA_MULTIPLE):
        raise QuantizationError(
            f"integer products on CUDA need sizes in multiples of {_CUDA_MULTIPLE}, not "
            f"[{layer.out_features}, {layer.in_features}]; use the layer itself"
        )
    packed = layer.packed
    rows = x.reshape(-1, layer.in_features)
    num_rows = len(rows)
    codes, row_scales = _quantise_rows(rows)
    if x.is_cuda and num_rows < _LEAST_CUDA_ROWS:
        codes = torch.nn.functional.pad(codes, (0, 0, 0, _LEAST_CUDA_ROWS - num_rows))
    sums = torch._int_mm(codes, packed["codes"].t())[:num_rows]
    y = torch.empty(num_rows, layer.out_features, dtype=x.dtype, device=x.device)
    column_scales = packed["scales"].float()
    for start, end in _pieces(y):
        piece = workspace("values", (end - start) * layer.out_features, torch.float32, x.device).view(end - start, -1)
        piece.copy_(sums[start:end]).mul_(row_scales[start:end]).mul_(column_scales)
        if layer.bias is not None:
            piece.add_(layer.bias)
        y[start:end].copy_(piece)
    return y.view(*x.shape[:-1], layer.out_features)


@torch.no_grad()
def measure_forward(
    in_features: int,
    out_features: int,
    num_tokens: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    num_turns: int = 5,
) -> ForwardTimes:
    """Let both paths take turns on random values of a shape, with this thread's settings."""
    device = torch.device(device)
    generator = torch.Generator(device).manual_seed(0)
    packed = {
        "codes": torch.randint(
            -_LARGEST_CODE, _LARGEST_CODE + 1, (out_features, in_features), dtype=torch.int8, device=device,
            generator=generator,
        ),
        "scales": torch.full((out_features,), 2.0**-10, dtype=torch.bfloat16, device=device),
    }  # fmt: skip
    layer = QuantLinear(Int8(), out_features, in_features, packed)
    x = torch.randn(num_tokens, in_features, device=device, generator=generator).to(dtype)
    best: dict[ForwardPath, float] = {"dequantised": float("inf"), "dynamic": float("inf")}
    # One turn more than counts: the first one allocates.
    for turn in range(num_turns + 1):
        for path in best:
            _wait_for(device)
            started_s = time.perf_counter()
            if path == "dynamic":
                forward_only(layer, x)
            else:
                layer(x)
            _wait_for(device)
            if turn:
                best[path] = min(best[path], time.perf_counter() - started_s)
    return ForwardTimes(dequantised_s=best["dequantised"], dynamic_s=best["dynamic"])


def _quantise_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes [N, K] and fp32 scales [N, 1] of activations [N, K]."""
    codes = torch.empty(rows.shape, dtype=torch.int8, device=rows.device)
    scales = torch.empty(len(rows), 1, dtype=torch.float32, device=rows.device)
    for start, end in _pieces(rows):
        shape = (end - start, rows.shape[1])
        values, magnitudes = (
            workspace(purpose, shape[0] * shape[1], torch.float32, rows.device).view(shape)
            for purpose in ("values", "magnitudes")
        )
        values.copy_(rows[start:end])
        # Not a vector norm, which is ten times slower on CPU.
        scale = scales[start:end]
        scale.copy_(torch.abs(values, out=magnitudes).amax(dim=1, keepdim=True)).div_(_LARGEST_CODE)
        # A token of zeros has scale 0 and codes 0.
        codes[start:end].copy_(values.mul_(torch.where(scale > 0, 1 / scale, 0)).round_())
    return codes, scales


def _pieces(matrix: Tensor) -> list[tuple[int, int]]:
    num_rows, num_columns = matrix.shape
    return list(row_tiles(num_rows, num_columns, multiple=1, max_elements=scratch_elements(matrix.device)))


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
