"""Modules that stand where a part of a transformers model is left out; needs torch."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from plutino.family import Family


class AddsNothing(nn.Module):
    """Stands where ``forward`` adds position embeddings that are in the hidden states already.

    Its output is negative zero, the one number whose sum with any other leaves every bit as it was: 0.0 would turn
    -0.0 into 0.0.
    """

    def forward(self, *_: object, **__: object) -> Tensor:
        """Give a scalar, which takes part in no dtype promotion."""
        return torch.tensor(-0.0)


class HandsOnEmbeddings(nn.Module):
    """Stands for an embedding module where the input has been through it."""

    def forward(self, *_: object, inputs_embeds: Tensor, **__: object) -> Tensor:
        """Give the input."""
        return inputs_embeds


def leave_out(model: nn.Module, family: Family, tensors: Iterable[str]) -> None:
    """Put stand-ins in the place of the modules that hold these tensors, as far as a model has them, in place."""
    modules = dict(model.named_modules())
    for tensor in tensors:
        name = tensor.rpartition(".")[0]
        if name in modules:
            model.set_submodule(name, AddsNothing() if name in family.entry_sums else nn.Identity())


def leave_out_entry(model: nn.Module, family: Family) -> None:
    """Let a model take what its first block gets in place of token embeddings, in place."""
    modules = dict(model.named_modules())
    leave_out(model, family, (*family.embedding, *family.optional_embedding))
    for name in family.entry_modules:
        model.set_submodule(name, HandsOnEmbeddings())
    for name in family.entry_factors:
        owner, _, attribute = name.rpartition(".")
        setattr(modules[owner], attribute, 1.0)
