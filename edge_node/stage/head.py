"""A model's own head on hidden states that are known: its ``forward`` with the part below the head left out."""

from __future__ import annotations

import copy
from typing import cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from plutino.families import Family

# Shape suffixes: D hidden size, V vocabulary.


class _KnownOutput:
    """Output of a base model of which only the hidden states are known."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> Tensor:
        assert index == 0
        return self.last_hidden_state

    def __getattr__(self, name: str) -> None:
        """Caches, attention maps and the like, which heads pass on without looking at them."""


class _GivesItsInput(nn.Module):
    """Stands for a base model whose output is known already."""

    @property
    def decoder(self) -> _GivesItsInput:
        """OPT's head looks for the decoder inside the base model."""
        return self

    def forward(
        self,
        *_: object,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        **__: object,
    ) -> _KnownOutput:
        """Hand the input on: the target's, where there are two."""
        known = inputs_embeds if decoder_inputs_embeds is None else decoder_inputs_embeds
        assert known is not None, "heads read hidden states"
        return _KnownOutput(known)


def logits_of(model: PreTrainedModel, family: Family, hidden: Tensor) -> Tensor:
    """Logits [..., V] of hidden states [..., D], with what the model does beside the product: soft caps, scales."""
    # Made anew because methods put other modules in the head's place.
    above_blocks = copy.copy(model)
    below = model.base_model_prefix
    # T5's head stands beside its decoder, without a base model around both halves.
    below = below if below in model._modules else "decoder"
    above_blocks._modules = dict(model._modules) | {below: _GivesItsInput()}
    rows = hidden.unsqueeze(0) if hidden.dim() == 2 else hidden
    known: dict[str, object] = {"inputs_embeds": rows}
    if family.halves is not None:
        known = {"encoder_outputs": (rows,), "decoder_inputs_embeds": rows}
    logits = cast(Tensor, above_blocks(**known, use_cache=False).logits)
    return logits.squeeze(0) if hidden.dim() == 2 else logits
