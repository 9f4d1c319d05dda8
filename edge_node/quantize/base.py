"""What a quantisation scheme is: how one frozen weight matrix is held in packed tensors, and given back.

A scheme is a value without state. Its packed tensors are plain tensors by name, so that safetensors holds them, and the
weight they stand for is one and the same on every device: codes and constants are multiplied in fp32 and rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from edge_node.quantize.workspace import scratch_elements
from plutino.errors import QuantizationError


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """One packed tensor of a weight, before there is one."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize


class Scheme(Protocol):
    """A way to hold a weight ``[out_features, in_features]`` in fewer bits."""

    @property
    def name(self) -> str:
        """Name in job specs and in :data:`edge_node.quantize.registry.SCHEMES`."""

    def check(self, out_features: int, in_features: int) -> None:
        """Refuse a shape that the scheme cannot hold.

        Raises:
            QuantizationError: what does not fit, and the way out.
        """

    def layout(self, out_features: int, in_features: int) -> dict[str, PackedTensor]:
        """Packed tensors of a weight of that shape, by name: all that is held of it."""

    def row_multiple(self, in_features: int) -> int:
        """Rows that must be unpacked together: a range of rows starts at a multiple of this."""

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """Quantise a floating weight [out, in]; the packed tensors lie on its device.

        Raises:
            QuantizationError: the shape does not fit, or a weight is not finite.
        """

    def unpack(self, packed: Mapping[str, Tensor], out: Tensor, *, start_row: int = 0) -> Tensor:
        """Dequantise rows ``[start_row, start_row + len(out))`` into ``out`` [rows, in_features] and return it.

        Args:
            packed: as :meth:`pack` returned it.
            out: contiguous, of any floating dtype: the fp32 values rounded once.
            start_row: a multiple of :meth:`row_multiple`.
        """


@runtime_checkable
class RowScaled(Protocol):
    """A scheme whose rows each have one scale, which products may apply to their output instead of to the weight.

    For few tokens that is much less to multiply.
    """

    def row_scales(self, packed: Mapping[str, Tensor]) -> Tensor:
        """The scales [out_features]."""

    def unpack_codes(self, packed: Mapping[str, Tensor], out: Tensor, *, start_row: int = 0) -> Tensor:
        """As :meth:`Scheme.unpack`, less the scales: exact in bf16, but too large for fp16 sums."""


def packed_bytes(scheme: Scheme, out_features: int, in_features: int) -> int:
    """Bytes a packed weight takes, all constants counted."""
    return sum(tensor.num_bytes for tensor in scheme.layout(out_features, in_features).values())


def check_packed(scheme: Scheme, out_features: int, in_features: int, packed: Mapping[str, Tensor]) -> None:
    """Refuse packed tensors that are not those of a weight of this shape.

    Raises:
        QuantizationError: a tensor is missing, unknown, or of another shape or dtype.
    """
    scheme.check(out_features, in_features)
    wanted = scheme.layout(out_features, in_features)
    if wanted.keys() != packed.keys():
        raise QuantizationError(
            f"{scheme.name} of a [{out_features}, {in_features}] weight consists of {', '.join(sorted(wanted))}, "
            f"not of {', '.join(sorted(packed)) or 'nothing'}; quantise the weight again"
        )
    for name, tensor in packed.items():
        expected = wanted[name]
        if tuple(tensor.shape) != expected.shape or tensor.dtype != expected.dtype:
            raise QuantizationError(
                f"{scheme.name}'s {name} of a [{out_features}, {in_features}] weight is {expected.dtype} "
                f"{list(expected.shape)}, not {tensor.dtype} {list(tensor.shape)}; quantise the weight again"
            )


def check_weight(scheme: Scheme, weight: Tensor) -> None:
    """Refuse what cannot be packed.

    Raises:
        QuantizationError: no floating matrix, or a shape that does not fit.
    """
    if weight.ndim != 2 or not weight.is_floating_point():
        raise QuantizationError(
            f"{scheme.name} packs floating matrices, not {weight.dtype} {list(weight.shape)}; leave it unpacked"
        )
    scheme.check(*weight.shape)


def check_finite(weight: Tensor, largest: Tensor) -> None:
    """Refuse a weight of which one of these largest magnitudes is not finite; each is NaN if one of its weights is.

    Raises:
        QuantizationError: one is not.
    """
    if not torch.isfinite(largest).all():
        raise QuantizationError(
            f"a [{weight.shape[0]}, {weight.shape[1]}] weight holds values that are not finite; "
            "get the model's files again"
        )


def row_tiles(num_rows: int, row_elements: int, *, multiple: int, max_elements: int) -> Iterator[tuple[int, int]]:
    """Ranges ``[start, end)`` of rows of at most ``max_elements``, or of ``multiple`` rows where those are more."""
    rows = max(multiple, max_elements // max(row_elements, 1) // multiple * multiple)
    for start in range(0, num_rows, rows):
        yield start, min(start + rows, num_rows)


def scale_groups(codes: Tensor, scales: Tensor, out: Tensor) -> None:
    """Put ``codes * scales`` into ``out``, rounded once.

    Args:
        codes: [N, group] of an integer dtype, at most 8 bits: exact in bf16.
        scales: bf16 [N, 1].
        out: [N, group] of any floating dtype.
    """
    rows = max(1, scratch_elements(out.device) // max(codes.shape[1], 1))
    if out.dtype not in (torch.bfloat16, torch.float32, torch.float64):
        # fp16 cannot hold every bf16 scale.
        for start in range(0, len(out), rows):
            piece = slice(start, start + rows)
            out[piece] = codes[piece].float().mul_(scales[piece].float())
        return
    scales = scales.to(out.dtype)
    # Piece by piece, so that the second operation finds in a core's cache what the first has written.
    for start in range(0, len(out), rows):
        piece = slice(start, start + rows)
        out[piece].copy_(codes[piece]).mul_(scales[piece])
