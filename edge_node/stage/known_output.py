"""A base model whose output is known, for heads that run by themselves."""

from __future__ import annotations

from torch import Tensor, nn


class KnownOutput:
    """Output of a base model of which only the hidden states are known."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> Tensor:
        assert index == 0
        return self.last_hidden_state

    def __getattr__(self, name: str) -> None:
        """Caches, attention maps and the like, which heads pass on without looking at them."""


class GivesItsInput(nn.Module):
    """Stands for a base model whose output is known already."""

    @property
    def decoder(self) -> GivesItsInput:
        """OPT's head looks for the decoder inside the base model."""
        return self

    def forward(
        self,
        *_: object,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        **__: object,
    ) -> KnownOutput:
        """Hand the input on: the target's, where there are two."""
        known = inputs_embeds if decoder_inputs_embeds is None else decoder_inputs_embeds
        assert known is not None, "heads read hidden states"
        return KnownOutput(known)
