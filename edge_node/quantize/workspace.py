"""Memory that dequantised tiles are written to: one buffer a thread on CPU, torch's allocator elsewhere.

A fresh buffer for every product would be mapped and zeroed by the kernel each time, which takes as long as
dequantising does. It is the thread's own, because stages of one process compute at the same time.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

TILE_ELEMENTS = 1 << 24
"""Weights dequantised at once, or one row multiple where that is more: 32 MiB in bf16, 64 MiB in fp32."""


_CACHED_ELEMENTS = 1 << 18
"""Weights that stay in a core's second-level cache over the few operations that dequantise them."""
_GPU_ELEMENTS = 1 << 22
"""Enough to fill a GPU, and little beside a tile."""


class _Buffers(threading.local):
    def __init__(self) -> None:
        self.by_purpose: dict[str, Tensor] = {}


_buffers = _Buffers()


def workspace(purpose: str, num_elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A flat tensor with undefined content, this thread's own until its next call with the same purpose."""
    if device.type != "cpu":
        # The allocator there keeps blocks by stream; a buffer of ours would be shared by streams.
        return torch.empty(num_elements, dtype=dtype, device=device)
    num_bytes = num_elements * dtype.itemsize
    buffer = _buffers.by_purpose.get(purpose)
    if buffer is None or buffer.nbytes < num_bytes:
        # A tensor made in inference mode could not be written to in training: one evaluation pass would break it.
        with torch.inference_mode(False):
            buffer = _buffers.by_purpose[purpose] = torch.empty(num_bytes, dtype=torch.uint8)
    return buffer[:num_bytes].view(dtype)


def release_workspace() -> None:
    """Give this thread's buffers back; the next product makes new ones."""
    _buffers.by_purpose.clear()


def held_workspace_bytes() -> int:
    """Bytes this thread's buffers hold."""
    return sum(buffer.nbytes for buffer in _buffers.by_purpose.values())


def scratch_elements(device: torch.device) -> int:
    """How many weights a scheme that needs several operations takes through them at once."""
    return _CACHED_ELEMENTS if device.type == "cpu" else _GPU_ELEMENTS
