"""A model's own head on hidden states that are known: its ``forward`` with the part below the head left out."""

from __future__ import annotations

import copy
from typing import cast

from torch import Tensor
from transformers import PreTrainedModel

from edge_node.stage.known_output import GivesItsInput
from plutino.families import Family

# Shape suffixes: D hidden size, V vocabulary.


def logits_of(model: PreTrainedModel, family: Family, hidden: Tensor) -> Tensor:
    """Logits [..., V] of hidden states [..., D], with what the model does beside the product: soft caps, scales."""
    # Made anew because methods put other modules in the head's place.
    above_blocks = copy.copy(model)
    below = model.base_model_prefix
    # T5's head stands beside its decoder, without a base model around both halves.
    below = below if below in model._modules else "decoder"
    above_blocks._modules = dict(model._modules) | {below: GivesItsInput()}
    rows = hidden.unsqueeze(0) if hidden.dim() == 2 else hidden
    known: dict[str, object] = {"inputs_embeds": rows}
    if family.halves is not None:
        known = {"encoder_outputs": (rows,), "decoder_inputs_embeds": rows}
    logits = cast(Tensor, above_blocks(**known, use_cache=False).logits)
    return logits.squeeze(0) if hidden.dim() == 2 else logits
