"""An embedding or output head trained in full beside its frozen original (peft's ``modules_to_save``)."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional


class TrainedCopy(nn.Module):
    """Stands in place of a module and computes with a trained fp32 weight, or with the original when switched off.

    Other than peft's wrapper it keeps the trained weight in fp32 also beside a bf16 original, and computes in the
    original's dtype.

    Args:
        original: an embedding or a linear layer without bias; frozen.
        weight: the trained weight, of the original's shape.
    """

    def __init__(self, original: nn.Embedding | nn.Linear, weight: nn.Parameter) -> None:
        super().__init__()
        self.original = original
        self.weight = weight
        self.is_enabled = True

    def forward(self, x: Tensor) -> Tensor:
        """What the original gives for ``x`` (token ids or hidden states), with the trained weight."""
        if not self.is_enabled:
            return cast(Tensor, self.original(x))
        if isinstance(self.original, nn.Embedding):
            # Look up first: casting the whole table would cost another table for a few rows.
            rows = functional.embedding(x, self.weight, padding_idx=self.original.padding_idx)
            rows = rows.to(self.original.weight.dtype)
            # Gemma's embedding scales what it looks up, by a buffer that is not trained.
            scale = getattr(self.original, "embed_scale", None)
            return rows if scale is None else rows * scale.to(rows.dtype)
        return functional.linear(x, self.weight.to(x.dtype))


def trainable_copy(weight: Tensor) -> nn.Parameter:
    """A trainable fp32 copy of a frozen weight."""
    return nn.Parameter(weight.detach().to(torch.float32, copy=True))
