"""One CUDA kernel for each scheme of 4 bits, codes to weights in one pass, where Triton can be imported.

torch's CUDA wheels bring Triton, which compiles at first use and wants a C compiler for that. Without either, or where
a kernel does not give torch's bits on this very card, torch's own operations do the work, in some passes more.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

_BYTES_AT_ONCE = 1024
"""Of codes, by one program of the kernel."""
_logger = logging.getLogger(__name__)

Nf4Launch = Callable[[Tensor, Tensor, Tensor, Tensor], None]
"""Codes [N / 2], fp32 constants [ceil(N / 64)], 16 fp32 levels; N weights out."""
Int4Launch = Callable[[Tensor, Tensor, Tensor, Tensor], None]
"""Codes [rows, K / 2], scales and zero points [rows, K / 128]; weights [rows, K] out."""


@functools.cache
def _programs() -> ModuleType | None:
    try:
        from edge_node.quantize import programs
    except ImportError as error:
        _logger.info("4-bit weights are dequantised by torch: %s", error)
        return None
    return programs


def _launch_nf4(codes: Tensor, absmax: Tensor, levels: Tensor, out: Tensor) -> None:
    programs = _programs()
    assert programs is not None
    num_bytes = codes.numel()
    with torch.cuda.device(out.device):
        programs.unpack_nf4[(-(-num_bytes // _BYTES_AT_ONCE),)](
            codes, absmax, levels, out, num_bytes, SIZE=_BYTES_AT_ONCE
        )


def _launch_int4(codes: Tensor, scales: Tensor, zeros: Tensor, out: Tensor) -> None:
    programs = _programs()
    assert programs is not None
    num_rows, half = codes.shape
    with torch.cuda.device(out.device):
        programs.unpack_int4[(num_rows, -(-half // _BYTES_AT_ONCE))](
            codes, scales, zeros, out, half, SIZE=_BYTES_AT_ONCE
        )


@functools.cache
def nf4_launch(dtype: torch.dtype, device: torch.device, reference: Nf4Launch) -> Nf4Launch | None:
    """The kernel for this dtype on this card, if it gives the reference's bits; else None."""
    if device.type != "cuda" or _programs() is None:
        return None
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (3 * _BYTES_AT_ONCE + 7,), dtype=torch.uint8, generator=generator).to(device)
    exponents = torch.randint(-6, 3, (-(-2 * len(codes) // 64),), generator=generator)
    absmax = (torch.rand(len(exponents), generator=generator) * 10.0**exponents).to(device)
    levels = torch.linspace(-1, 1, 16, device=device)

    def run(launch: Nf4Launch) -> Tensor:
        out = torch.empty(2 * len(codes), dtype=dtype, device=device)
        launch(codes, absmax, levels, out)
        return out

    return _if_equal("nf4", lambda: run(_launch_nf4), lambda: run(reference), _launch_nf4)


@functools.cache
def int4_launch(dtype: torch.dtype, device: torch.device, reference: Int4Launch) -> Int4Launch | None:
    """The same of int4."""
    if device.type != "cuda" or _programs() is None:
        return None
    generator = torch.Generator().manual_seed(0)
    num_rows, num_inputs = 3, 2 * _BYTES_AT_ONCE + 384
    codes = torch.randint(0, 256, (num_rows, num_inputs // 2), dtype=torch.uint8, generator=generator).to(device)
    groups = (num_rows, num_inputs // 128)
    exponents = torch.randint(-6, 3, groups, generator=generator)
    scales = (torch.rand(groups, generator=generator) * 10.0**exponents).bfloat16().to(device)
    zeros = torch.randint(0, 16, groups, dtype=torch.uint8, generator=generator).to(device)

    def run(launch: Int4Launch) -> Tensor:
        out = torch.empty(num_rows, num_inputs, dtype=dtype, device=device)
        launch(codes, scales, zeros, out)
        return out

    return _if_equal("int4", lambda: run(_launch_int4), lambda: run(reference), _launch_int4)


def _if_equal(
    scheme: str, kernel: Callable[[], Tensor], reference: Callable[[], Tensor], launch: Nf4Launch
) -> Nf4Launch | None:
    try:
        found = kernel()
        torch.cuda.synchronize(found.device)
    except Exception as error:  # Triton has its own ways to fail: no compiler, an unknown card
        _logger.warning("no kernel for %s, which torch will dequantise: %s", scheme, str(error).splitlines()[:1])
        return None
    if not torch.equal(found, reference()):
        _logger.warning("the kernel for %s gives other bits here; torch will dequantise it", scheme)
        return None
    return launch
