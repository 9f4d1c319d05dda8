"""Encoder-decoders: how both halves are cut to a stage, and how a stage runs its part of each.

Two streams pass every border: the source's states [B, S, D], which behind the encoder's last block are its output, and
the target's [B, T, D], which are its embeddings until the decoder's first block. A stage runs its encoder blocks on the
one and its decoder blocks on the other, and hands on what it has no block for. The first stage embeds both texts, so
that the table is on no stage between; a gradient comes back for both, and what decoder blocks of several stages want
of the encoder's output is added up on its way down.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel

from plutino.bias_tables import put_table, table_shape
from plutino.families import Family
from plutino.stand_ins import leave_out

# Shape suffixes: B rows, S source tokens, T target tokens of this pass, D hidden size.


def cut_halves(
    model: PreTrainedModel,
    family: Family,
    start_block: int,
    end_block: int,
    *,
    num_encoder_blocks: int,
    num_blocks: int,
) -> None:
    """Take from a whole meta model what is not part of the stage, but for the head, in place.

    Blocks keep their names. The first block here of either half gets the table that the half's first one has.
    """
    halves = family.halves
    assert halves is not None, "the model has two halves"
    own = {name: nn.ModuleList() for name in (family.block_prefix, halves.decoder_prefix)}
    dtype = next(model.parameters()).dtype
    for block in range(start_block, end_block):
        name = family.block_name(block, num_encoder_blocks)
        prefix, _, index = name.rpartition(".")
        own_blocks = own[f"{prefix}."]
        module = model.get_submodule(name)
        if halves.table and not own_blocks and index != "0":
            put_table(module, halves.table, torch.empty(table_shape(module, halves.table), dtype=dtype, device="meta"))
        for part in module.modules():
            if hasattr(part, "layer_idx"):
                part.layer_idx = len(own_blocks)  # type: ignore[assignment]
        own_blocks.add_module(index, module)
    for prefix, blocks in own.items():
        model.set_submodule(prefix.rstrip("."), blocks)
    for half in (halves.encoder, halves.decoder):
        model.set_submodule(f"{half}.embed_tokens", nn.Identity())
    leave_out(model, family, () if start_block == 0 else family.embedding)
    has_decoder_entry = start_block <= num_encoder_blocks < end_block
    leave_out(model, family, () if has_decoder_entry else halves.decoder_entry)
    leave_out(model, family, () if start_block < num_encoder_blocks <= end_block else halves.encoder_final)
    leave_out(model, family, () if end_block == num_blocks else family.final)


def copied_tables(family: Family, start_block: int, end_block: int, *, num_encoder_blocks: int) -> dict[str, str]:
    """Tensor of the stage's first block of either half -> the tensor that it is a copy of, both by global names."""
    halves = family.halves
    if halves is None or not halves.table:
        return {}
    if start_block in (0, num_encoder_blocks) or start_block == end_block:
        return {}  # the first block of a half has its own, and a half that begins later on the stage does so with it
    own = f"{family.block_name(start_block, num_encoder_blocks)}.{halves.table}"
    return {own: table_name(family, start_block, num_encoder_blocks)}


def table_name(family: Family, block: int, num_encoder_blocks: int) -> str:
    """Global name of the table that a block uses: that of its half's first block."""
    assert family.halves is not None and family.halves.table, "the family has such tables"
    first = 0 if block < num_encoder_blocks else num_encoder_blocks
    return f"{family.block_name(first, num_encoder_blocks)}.{family.halves.table}"


def run_halves(
    model: PreTrainedModel,
    family: Family,
    source_BSD: Tensor | None,
    target_BTD: Tensor,
    *,
    source_mask_BS: Tensor | None,
    cache: Cache | None,
    has_new_source: bool = True,
) -> tuple[Tensor | None, Tensor]:
    """Run the stage's blocks of both halves; gives both streams.

    Args:
        model: the stage's part of the model.
        family: of the model.
        source_BSD: the source's states from below; None where later tokens of a target do not need it.
        target_BTD: the target's states from below, tokens of this pass.
        source_mask_BS: 1 for tokens of the source, 0 for padding; None: no padding.
        cache: of the decoder's blocks.
        has_new_source: the encoder's blocks run; otherwise the source has been through them.
    """
    halves = family.halves
    assert halves is not None, "the model has two halves"
    encoder, decoder = model.get_submodule(halves.encoder), model.get_submodule(halves.decoder)
    if has_new_source and source_BSD is not None and len(model.get_submodule(family.block_prefix[:-1])):  # type: ignore[arg-type]
        output = encoder(inputs_embeds=source_BSD, attention_mask=source_mask_BS)
        source_BSD = cast(Tensor, output.last_hidden_state)
    if len(model.get_submodule(halves.decoder_prefix[:-1])):  # type: ignore[arg-type]
        assert source_BSD is not None, "decoder blocks look at the encoder's output"
        output = decoder(
            inputs_embeds=target_BTD,
            encoder_hidden_states=source_BSD,
            encoder_attention_mask=source_mask_BS,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        target_BTD = cast(Tensor, output.last_hidden_state)
    return source_BSD, target_BTD


def new_halves_cache() -> Cache:
    """An empty cache of the decoder's own keys and values and of those of the encoder's output."""
    return cast(Cache, EncoderDecoderCache(DynamicCache(), DynamicCache()))


def start_token_id(config: Any) -> int:
    """What a target's first token follows: as transformers shifts labels."""
    start = getattr(config, "decoder_start_token_id", None)
    if start is None:
        start = config.pad_token_id
    return int(start)
