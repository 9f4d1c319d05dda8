"""One CUDA kernel for each scheme of 4 bits, codes to weights in one pass, where Triton can be imported.

torch's CUDA wheels bring Triton, which compiles at first use and wants a C compiler for that. Without either, or where
a kernel does not give torch's bits on this very card, torch's own operations do the work, in some passes more.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from types import ModuleType

import torch
from torch import Tensor

from edge_node.quantize.nf4_levels import constant_levels, levels

_BYTES_AT_ONCE = 1024
"""Of codes, by one program of a kernel."""
_NF4_BLOCK = 64
_INT4_GROUP = 128
_logger = logging.getLogger(__name__)

Launch = Callable[[Mapping[str, Tensor], Tensor, int], None]
"""Packed tensors; weights [rows, in_features] out; the first row."""


@functools.cache
def _programs() -> ModuleType | None:
    try:
        from edge_node.quantize import programs
    except ImportError as error:
        _logger.info("4-bit weights are dequantised by torch: %s", error)
        return None
    return programs


def launch_nf4(packed: Mapping[str, Tensor], out: Tensor, start_row: int) -> None:
    """Dequantise nf4's rows from ``start_row`` on, which begins a block."""
    programs = _programs()
    assert programs is not None
    start, num_bytes, device = start_row * out.shape[1], out.numel() // 2, out.device
    programs.unpack_nf4[(-(-num_bytes // _BYTES_AT_ONCE),)](
        packed["codes"][start // 2 :],
        packed["absmax"],
        packed["nested_absmax"],
        packed["nested_offset"],
        constant_levels(device),
        levels(device),
        out,
        num_bytes,
        start // _NF4_BLOCK,
        SIZE=_BYTES_AT_ONCE,
        # A constant is a product and a sum, each rounded: as one operation it would have other bits.
        enable_fp_fusion=False,
    )


def launch_int4(packed: Mapping[str, Tensor], out: Tensor, start_row: int) -> None:
    """Dequantise int4's rows from ``start_row`` on."""
    programs = _programs()
    assert programs is not None
    codes, scales, zeros = (packed[name][start_row:] for name in ("codes", "scales", "zeros"))
    half = out.shape[1] // 2
    programs.unpack_int4[(len(out), -(-half // _BYTES_AT_ONCE))](codes, scales, zeros, out, half, SIZE=_BYTES_AT_ONCE)


@functools.cache
def nf4_launch(dtype: torch.dtype, device: torch.device, reference: Callable[..., Tensor]) -> Launch | None:
    """The kernel for this dtype on this card, if it gives the reference's bits; else None.

    Args:
        dtype: of the weights.
        device: the card.
        reference: the scheme's unpacking by torch alone.
    """
    num_rows, in_features = 3 * 64, 2 * 65
    num_blocks = num_rows * in_features // _NF4_BLOCK

    def packed(generator: torch.Generator) -> dict[str, Tensor]:
        return {
            "codes": _bytes(num_rows * in_features // 2, generator=generator),
            "absmax": _bytes(num_blocks, generator=generator),
            "nested_absmax": _magnitudes(-(-num_blocks // 256), generator=generator),
            "nested_offset": torch.rand((), generator=generator),
        }

    return _if_equal("nf4", packed, (num_rows, in_features), 32, dtype, device, launch_nf4, reference)


@functools.cache
def int4_launch(dtype: torch.dtype, device: torch.device, reference: Callable[..., Tensor]) -> Launch | None:
    """The same of int4."""
    num_rows, in_features = 3, 2 * _BYTES_AT_ONCE + 3 * _INT4_GROUP

    def packed(generator: torch.Generator) -> dict[str, Tensor]:
        groups = (num_rows, in_features // _INT4_GROUP)
        return {
            "codes": _bytes(num_rows, in_features // 2, generator=generator),
            "scales": _magnitudes(*groups, generator=generator).bfloat16(),
            "zeros": _bytes(*groups, generator=generator) & 15,
        }

    return _if_equal("int4", packed, (num_rows, in_features), 1, dtype, device, launch_int4, reference)


def _if_equal(
    scheme: str,
    packed: Callable[[torch.Generator], dict[str, Tensor]],
    shape: tuple[int, int],
    start_row: int,
    dtype: torch.dtype,
    device: torch.device,
    launch: Launch,
    reference: Callable[..., Tensor],
) -> Launch | None:
    if device.type != "cuda" or _programs() is None:
        return None
    on_card = {name: tensor.to(device) for name, tensor in packed(torch.Generator().manual_seed(0)).items()}

    @functools.wraps(launch)
    def on_its_card(packed: Mapping[str, Tensor], out: Tensor, start_row: int) -> None:
        if device.index == torch.cuda.current_device():
            launch(packed, out, start_row)
            return
        with torch.cuda.device(device):
            launch(packed, out, start_row)

    for first in (0, start_row):
        found, expected = (torch.empty(shape[0] - first, shape[1], dtype=dtype, device=device) for _ in range(2))
        try:
            on_its_card(on_card, found, first)
            torch.cuda.synchronize(device)
        except Exception as error:  # Triton has its own ways to fail: no compiler, an unknown card
            _logger.warning("no kernel for %s, which torch will dequantise: %s", scheme, str(error).splitlines()[:1])
            return None
        if not torch.equal(found, reference(on_card, expected, start_row=first)):
            _logger.warning("the kernel for %s gives other bits here; torch will dequantise it", scheme)
            return None
    return on_its_card


def _bytes(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def _magnitudes(*shape: int, generator: torch.Generator) -> Tensor:
    """Numbers of all sizes that constants have."""
    return torch.rand(shape, generator=generator) * 10.0 ** torch.randint(-6, 3, shape, generator=generator)
