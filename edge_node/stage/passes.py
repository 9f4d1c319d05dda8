"""What a pass through a stage takes and gives."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from edge_node.stage.placing import to_device
from plutino.side_network import BackboneStates


# Shape suffixes: B rows, T tokens of this pass, D hidden size, V vocabulary.
@dataclass(frozen=True, slots=True, kw_only=True)
class StageInput:
    """What one micro-batch brings to a stage."""

    position_ids: Tensor
    """int64 [B, T], from :func:`edge_node.stage.architecture.make_position_ids`."""
    input_ids: Tensor | None = None
    """int64 [B, T] on the first stage, None on the others."""
    hidden: Tensor | None = None
    """[B, T, D], the previous stage's output; None on the first stage, and where blocks below did not run."""
    side: Tensor | None = None
    """fp32 [B, T, R], the previous stage's side state, of an encoder-decoder the target's; None where no side network
    runs below."""
    source_side: Tensor | None = None
    """fp32 [B, S, R], the side state of an encoder-decoder's source."""
    attention_mask: Tensor | None = None
    """[B, tokens seen so far with this pass]: 1 for tokens, 0 for padding. None: no padding."""
    segment_ids: Tensor | None = None
    """int64 [B, T], segment of each token of packed rows, from 0 up; None: every row is one sequence."""
    target_ids: Tensor | None = None
    """int64 [B, T] on an encoder-decoder's first stage, whose ``input_ids`` and ``attention_mask`` are the source's."""
    source: Tensor | None = None
    """[B, S, D], an encoder-decoder's source as the previous stage left it; ``hidden`` is the target's then."""
    has_new_source: bool = True
    """False: the encoder's blocks have seen the source."""
    token_types: Tensor | None = None
    """int64 [B, T] on the first stage: 0 for tokens of the first text, 1 for those of the second; None: one text."""
    num_prompt_tokens: int = 0
    """Virtual tokens that come before the rows' own in this pass: counted in the other fields' T, but for input_ids."""
    cache: Cache | None = None
    """KV cache of this stage, extended in place; None in training."""

    def on(self, device: torch.device) -> StageInput:
        """The same on the device that computes, without waiting for it."""
        if device.type == "cpu":
            return self
        parts: dict[str, Any] = {part.name: getattr(self, part.name) for part in fields(self)}
        moved: dict[str, Any] = {name: to_device(t, device) for name, t in parts.items() if isinstance(t, Tensor)}
        return replace(self, **moved)

    @property
    def trained(self) -> dict[str, Tensor]:
        """What of the previous stage's output may want a gradient back, by the names of :class:`StageOutput`."""
        return _trained(self.hidden, self.source, self.side, self.source_side)


@dataclass(frozen=True, slots=True)
class StageOutput:
    """What a stage makes of one micro-batch."""

    known_hidden: Tensor | None
    """[B, T, D]: on the last stage what the head reads; None where the blocks did not run and nobody needs it."""
    side: Tensor | None = None
    """fp32 [B, T, R], the side state; None where no side network runs, and on the last stage, which mixes it in. Of an
    encoder-decoder the target's, from its decoder on."""
    states: BackboneStates | None = None
    """What a side network read of the blocks, or what the lowest trained block got, where that is kept."""
    source: Tensor | None = None
    """[B, S, D], of an encoder-decoder; None where later tokens of a target do not need it."""
    source_side: Tensor | None = None
    """fp32 [B, S, R], the side state of an encoder-decoder's source."""

    @property
    def hidden(self) -> Tensor:
        """The hidden states of blocks that did run."""
        assert self.known_hidden is not None, "the blocks did not run"
        return self.known_hidden

    @property
    def trained(self) -> dict[str, Tensor]:
        """The parts that a gradient comes back for, by name."""
        return _trained(self.known_hidden, self.source, self.side, self.source_side)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What the next stage gets, by name."""
        parts = {"hidden": self.known_hidden, "side": self.side, "source": self.source, "source side": self.source_side}
        return {name: tensor.detach() for name, tensor in parts.items() if tensor is not None}


@dataclass(frozen=True, slots=True)
class FrozenPass:
    """What the blocks give beside a side network: it follows from the input alone, whatever is trained."""

    output: StageOutput
    states: BackboneStates


def _trained(
    hidden: Tensor | None, source: Tensor | None, side: Tensor | None, source_side: Tensor | None
) -> dict[str, Tensor]:
    """What a gradient comes back for: beside a side network its states alone, by name."""
    beside = {"source side": source_side, "side": side}
    has_side = any(tensor is not None for tensor in beside.values())
    parts = beside if has_side else {"source": source, "hidden": hidden}
    return {name: tensor for name, tensor in parts.items() if tensor is not None}
