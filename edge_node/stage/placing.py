"""Tensors on their way to a card, without waiting for it.

A copy from ordinary memory blocks its caller until the card has done everything that was asked of it before. From
page-locked memory it is only queued: the program goes on and launches kernels ahead.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on ``device``; on a card it is there for whatever is queued on the current stream after this.

    torch's allocator of page-locked memory hands nothing out again before the copy is through, so the caller may let go
    of ``tensor`` at once.
    """
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    # Page-locked memory of one row that stands for all of them cannot be written.
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)
