"""The narrow blocks of a side network: transformers' own model of a narrowed configuration, less what is not needed.

Needs torch and transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from plutino.bias_tables import bias_by_own_table, put_table, table_shape
from plutino.families import Family
from plutino.family import Kind
from plutino.side_layout import SideLayout
from plutino.stand_ins import leave_out, leave_out_entry

_MADE_BY: Mapping[Kind, Any] = {
    "decoder": AutoModelForCausalLM,
    "encoder": AutoModelForSequenceClassification,
    "encoder-decoder": AutoModelForSeq2SeqLM,
}


@dataclass(frozen=True, slots=True)
class SideBlocks:
    """Side blocks, and the models that make masks and positions around them."""

    stacks: tuple[nn.Module, ...]
    """The model around the blocks; of an encoder-decoder its encoder and its decoder. Nothing stands before and behind
    the blocks."""
    blocks: tuple[nn.Module, ...]
    """In order; an encoder's before its decoder's."""
    norm: nn.Module
    """What the model has behind its last block."""
    encoder_norm: nn.Module
    """What an encoder-decoder has behind its encoder's last block."""


def make_side_blocks(layout: SideLayout, family: Family, own_blocks: Sequence[int], attention: str) -> SideBlocks:
    """The side blocks that follow some blocks of a model, with values of no use.

    Args:
        layout: the whole side network.
        family: of the model.
        own_blocks: the followed blocks.
        attention: transformers' attention backend.
    """
    config = CONFIG_MAPPING[family.model_type].from_dict(layout.stage_config(own_blocks, family))
    if family.halves is not None and family.halves.table:
        # Biases that are trained keep torch from its fused kernel, and what stands in for it looks for rows that are
        # masked whole: with 12 heads of 8 numbers and 52 tokens both passes take 2.2 ms, written out 1.2.
        attention = "eager"
    made_by: Any = _MADE_BY[family.kind]
    # Whatever transformers draws is drawn aside: nobody's generator moves.
    with torch.random.fork_rng(devices=[]):
        model = made_by.from_config(config, attn_implementation=attention, dtype=torch.float32)
    assert isinstance(model, PreTrainedModel)
    leave_out_entry(model, family)
    # What an encoder has behind its blocks is a pooler, which stays the model's own.
    norm = _taken_out(model, family.final)
    norm = nn.Identity() if family.kind == "encoder" else norm
    if family.halves is None:
        blocks = list(model.get_submodule(family.block_prefix.rstrip(".")).children())[: len(own_blocks)]
        return SideBlocks((model.base_model,), tuple(blocks), norm, nn.Identity())
    leave_out(model, family, family.halves.decoder_entry)
    encoder_norm = _taken_out(model, family.halves.encoder_final)
    stacks = tuple(model.get_submodule(name) for name in (family.halves.encoder, family.halves.decoder))
    prefixes = (family.block_prefix, family.halves.decoder_prefix)
    blocks = [block for prefix in prefixes for block in model.get_submodule(prefix.rstrip(".")).children()]
    if family.halves.table:
        for block in blocks:
            if family.halves.table not in dict(block.named_parameters()):
                put_table(block, family.halves.table, torch.zeros(table_shape(block, family.halves.table)))
            bias_by_own_table(block, family.halves.table)
    return SideBlocks(stacks, tuple(blocks), norm, encoder_norm)


def _taken_out(model: nn.Module, prefixes: Sequence[str]) -> nn.Module:
    """What stands behind the last block, taken from a model; nothing where its family has nothing there."""
    names = [prefix.rstrip(".") for prefix in prefixes]
    found = {name: module for name, module in model.named_modules() if name in names}
    for name in found:
        model.set_submodule(name, nn.Identity())
    return found.get(names[0], nn.Identity()) if names else nn.Identity()
