"""bitsandbytes' dequantisation kernels, if the package is installed; its Python part is never imported.

That import takes seconds and tens of MiB, asks a hub for more kernels, and brings layers that lose gradients; the
shared library alone needs nothing but torch's own OpenMP runtime. Its functions are called by address, so a version
with other ones must not go unnoticed: before first use a kernel must give this package's values bit for bit.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

Nf4Kernel = Callable[[Tensor, Tensor, Tensor], None]
"""Dequantises codes [N / 2] with fp32 constants [N / 64] into out [rows, columns] of N elements, a multiple of 64."""

_BLOCK = 64
_logger = logging.getLogger(__name__)
_SYMBOLS = {
    torch.bfloat16: "cdequantize_blockwise_cpu_nf4_bf16",
    torch.float16: "cdequantize_blockwise_cpu_nf4_fp16",
    torch.float32: "cdequantize_blockwise_cpu_nf4_fp32",
}


@functools.cache
def nf4_kernel(dtype: torch.dtype, device: torch.device, reference: Nf4Kernel) -> Nf4Kernel | None:
    """The kernel for this dtype on this device that gives the reference's bits, or None."""
    if device.type != "cpu" or dtype not in _SYMBOLS:
        return None
    library = _cpu_library()
    if library is None:
        return None
    try:
        function = getattr(library, _SYMBOLS[dtype])
    except AttributeError:
        _logger.warning("bitsandbytes has no %s; nf4 is dequantised by torch", _SYMBOLS[dtype])
        return None
    function.restype = None
    function.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_longlong] * 3
    kernel = _as_kernel(function)
    if not _agree(kernel, reference, dtype):
        _logger.warning("bitsandbytes' %s gives other values; nf4 is dequantised by torch", _SYMBOLS[dtype])
        return None
    return kernel


@functools.cache
def _cpu_library() -> ctypes.CDLL | None:
    # find_spec of a top-level name looks for the package without importing it.
    spec = importlib.util.find_spec("bitsandbytes")
    if spec is None or not spec.submodule_search_locations:
        return None
    suffix = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
    path = Path(spec.submodule_search_locations[0]) / f"libbitsandbytes_cpu{suffix}"
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        _logger.warning("cannot load %s: %s; nf4 is dequantised by torch", path, error)
        return None


def _as_kernel(function: Callable[..., None]) -> Nf4Kernel:
    def kernel(codes: Tensor, absmax: Tensor, out: Tensor) -> None:
        assert codes.is_contiguous() and absmax.is_contiguous() and out.is_contiguous()
        columns = out.shape[1] if out.shape[1] % _BLOCK == 0 else _BLOCK
        function(codes.data_ptr(), absmax.data_ptr(), out.data_ptr(), _BLOCK, out.numel() // columns, columns)

    return kernel


def _agree(kernel: Nf4Kernel, reference: Nf4Kernel, dtype: torch.dtype) -> bool:
    # Every pair of codes, under constants of all sizes that weights have.
    generator = torch.Generator().manual_seed(0)
    absmax = torch.rand(64, generator=generator) * 10.0 ** torch.arange(-4, 4).repeat_interleave(8)
    codes = torch.arange(256, dtype=torch.uint8).repeat(8)
    for columns in (_BLOCK, 4 * _BLOCK):
        found, expected = (torch.empty(2 * len(codes) // columns, columns, dtype=dtype) for _ in range(2))
        kernel(codes, absmax, found)
        reference(codes, absmax, expected)
        if not torch.equal(found, expected):
            return False
    return True
