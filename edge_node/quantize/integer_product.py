"""int8 products without a gradient: activations are quantised too, by token, and integers are multiplied.

For methods that send no gradient through the backbone, on layers that int8 holds (LLM.int8() without outliers, Dettmers
et al. 2022, arXiv:2208.07339). Twice bf16's rate on paper; but activations must be read, scaled and rounded, and sums
brought back, so that whether it pays depends on processor and shape: a job's devices measure it. Its values differ from
those of the dequantised weight, so the answer belongs into the job's numerics record. Sums of integers are exact: they
depend neither on threads nor on the rows beside a row.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from edge_node.quantize.base import row_tiles
from edge_node.quantize.workspace import scratch_elements, workspace
from plutino.errors import QuantizationError

_LARGEST_CODE = 127
_LEAST_CUDA_ROWS = 17
_CUDA_MULTIPLE = 8
"""What torch._int_mm asks for on CUDA."""


def check_integer_product(out_features: int, in_features: int, device: torch.device) -> None:
    """Refuse a weight whose integers cannot be multiplied on a device.

    Raises:
        QuantizationError: its sizes are the reason.
    """
    if device.type == "cuda" and (in_features % _CUDA_MULTIPLE or out_features % _CUDA_MULTIPLE):
        raise QuantizationError(
            f"integer products on CUDA need sizes in multiples of {_CUDA_MULTIPLE}, not "
            f"[{out_features}, {in_features}]; set model.integer_products: never"
        )


@torch.no_grad()
def integer_product(x: Tensor, packed: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
    """Give x W^T + b by way of integers; it has no gradient.

    Args:
        x: [..., in_features], of any floating dtype.
        packed: W's tensors of :class:`edge_node.quantize.int8.Int8`.
        bias: [out_features] or None.

    Returns:
        [..., out_features] in the dtype of ``x``.
    """
    out_features, in_features = packed["codes"].shape
    rows = x.reshape(-1, in_features)
    num_rows = len(rows)
    codes, row_scales = _quantise_rows(rows)
    if x.is_cuda and num_rows < _LEAST_CUDA_ROWS:
        codes = torch.nn.functional.pad(codes, (0, 0, 0, _LEAST_CUDA_ROWS - num_rows))
    sums = torch._int_mm(codes, packed["codes"].t())[:num_rows]
    y = torch.empty(num_rows, out_features, dtype=x.dtype, device=x.device)
    column_scales = packed["scales"].float()
    for start, end in _pieces(y):
        piece = workspace("values", (end - start) * out_features, torch.float32, x.device).view(end - start, -1)
        piece.copy_(sums[start:end]).mul_(row_scales[start:end]).mul_(column_scales)
        if bias is not None:
            piece.add_(bias)
        y[start:end].copy_(piece)
    return y.view(*x.shape[:-1], out_features)


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
