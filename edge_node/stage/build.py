"""How a stage comes to be: the Hugging Face model with only its own blocks, filled tensor by tensor.

:func:`build_stage` is the entry point. The backbone is frozen and always in evaluation mode.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from edge_node.stage.architecture import (
    build_meta_model,
    count_blocks,
    cut_to_stage,
    list_block_linears,
    parse_config,
    rebuild_buffers,
)
from edge_node.stage.halves import copied_tables
from edge_node.stage.packing import PackedCache, StagePacker
from edge_node.stage.recomputing import recompute
from edge_node.stage.stage import Stage
from edge_node.stage.stored_names import StoredNames
from edge_node.stage.weights import ReadsAhead, TensorSource
from plutino.errors import ModelError
from plutino.families import Family, family_of
from plutino.job.model import PLAIN, Packing

COMPUTE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Dtypes of weights and computation, by their names in job specs."""

_CPU = torch.device("cpu")


def build_stage(
    source: TensorSource,
    start_block: int,
    end_block: int,
    *,
    dtype: torch.dtype,
    attention: str | None = None,
    checkpointing: bool = False,
    packing: Packing = PLAIN,
    device: torch.device = _CPU,
    cache: PackedCache | None = None,
    has_lm_head: bool = True,
    has_backbone: bool = True,
) -> Stage:
    """Load blocks ``[start_block, end_block)``, with the embedding if first, the final norm and the head if last.

    The model is built on the meta device and its own tensors are read one by one: memory peaks at the stage's weights
    as they are held plus one matrix in its stored dtype. No tensor outside the stage is read.

    Args:
        source: the model's configuration and tensors.
        start_block: first block.
        end_block: one past the last block.
        dtype: dtype of weights and computation.
        attention: transformers' attention backend, sdpa or eager; None: the family's.
        checkpointing: recompute each block in the backward pass instead of keeping its activations.
        packing: how frozen weights are held.
        device: where the stage computes.
        cache: packed tensors that earlier jobs left on this device.
        has_lm_head: whether the last stage holds the model's own head.
        has_backbone: whether it holds its blocks and the embedding; without them only what stands beside and above
            blocks runs, on states that the activation cache knows.

    Raises:
        ModelError: unknown family, blocks that the model does not have, or tensors missing or of another shape.
        QuantizationError: a layer cannot be packed as asked.
    """
    config = parse_config(source.config())
    num_blocks, num_encoder_blocks = count_blocks(config)
    if not 0 <= start_block < end_block <= num_blocks:
        raise ModelError(f"blocks [{start_block}, {end_block}) were asked of a model with blocks [0, {num_blocks})")
    family = family_of(config.model_type)
    attention = attention or family.attention
    model = build_meta_model(config, dtype=dtype, attention=attention)
    block_linears = list_block_linears(model, family)
    kept_block = start_block if has_backbone else end_block
    cut_to_stage(model, family, kept_block, end_block, has_lm_head=has_lm_head)
    rebuild_buffers(model)
    bytes_before = source.bytes_read
    has_own_head = family.has_own_head(source.config(), source.names())
    is_tied = bool(family.head) and bool(config.tie_word_embeddings) and not has_own_head
    copies = copied_tables(family, kept_block, end_block, num_encoder_blocks=num_encoder_blocks)
    stored_names = StoredNames(model, source.names(), family, is_tied=is_tied, copies=copies)
    packer = StagePacker(source, stored_names.find, packing, dtype=dtype, device=device, cache=cache)
    own_blocks = [family.block_name(block, num_encoder_blocks) for block in range(kept_block, end_block)]
    own_linears = [name for name in block_linears if name.startswith(tuple(f"{block}." for block in own_blocks))]
    packed_linears = own_linears if packing.scheme != "none" else ()
    names = _check_complete(model, stored_names, packer, packed_linears)
    packer.prepare(names)
    if isinstance(source, ReadsAhead):
        source.prepare(stored for name in names if not packer.is_kept(name) for stored in stored_names.pieces(name))
    packer.pack_linears(model, own_linears)
    packer.pack_outer(
        model,
        family.embedding[0].removesuffix(".weight") if kept_block == 0 else None,
        family.head.removesuffix(".weight") if end_block == num_blocks and has_lm_head and family.head else None,
    )
    names_read = (*packer.names_read, *_fill(model, source, stored_names, dtype=dtype, device=device))
    if end_block == num_blocks:
        names_read = (*names_read, *_fill_buffers(model, source, family, dtype=dtype))
    if is_tied:
        _share_if_equal(model, family)
    if not has_lm_head:
        # A score head takes its place, and the embedding has nobody to share a parameter with.
        config.tie_word_embeddings = False
    nn.Module.to(model, device)
    model.eval()
    model.requires_grad_(False)
    if checkpointing:
        for block in own_blocks:
            recompute(model.get_submodule(block))
    return Stage(
        model,
        config,
        start_block,
        end_block,
        dtype=dtype,
        attention=attention,
        packing=packing,
        device=device,
        block_linears=block_linears,
        tensor_names_read=names_read,
        bytes_read=source.bytes_read - bytes_before,
        has_backbone=has_backbone,
        has_own_head=has_own_head,
    )


def _check_complete(
    model: PreTrainedModel, stored_names: StoredNames, packer: StagePacker, packed_linears: Sequence[str]
) -> list[str]:
    """Refuse a checkpoint that lacks tensors of a meta model's parameters, before anything is read.

    Returns:
        Names of the parameters that will be read, or of the parts that pack them.
    """
    packed_weights = {f"{linear}.weight" for linear in packed_linears}
    names = [name for name, _ in model.named_parameters(remove_duplicate=False) if name not in packed_weights]
    wanted: dict[str, str | None] = {name: stored_names.find(name) for name in names}
    for linear in packed_linears:
        wanted |= {f"{linear}.{part}": stored for part, stored in packer.stored_parts(linear).items()}
    missing = [name for name, stored in wanted.items() if stored is None]
    if missing:
        raise ModelError(
            f"the checkpoint lacks {len(missing)} of the stage's {len(wanted)} tensors: {', '.join(missing[:8])}"
            f"{', ...' if len(missing) > 8 else ''}; download it again, or check that config.json belongs to it"
        )
    return list(wanted)


def _fill(
    model: PreTrainedModel, source: TensorSource, stored_names: StoredNames, *, dtype: torch.dtype, device: torch.device
) -> tuple[str, ...]:
    """Read every parameter that is still meta; two that come from the same stored tensors share one parameter."""
    filled: dict[tuple[str, ...], nn.Parameter] = {}
    for name in [name for name, p in model.named_parameters(remove_duplicate=False) if p.is_meta]:
        recipe = stored_names.recipe(name)
        module_name, _, key = name.rpartition(".")
        module = model.get_submodule(module_name)
        if recipe.stored not in filled:
            expected, found = tuple(module.get_parameter(key).shape), recipe.shape(source)
            if expected != found:
                raise ModelError(
                    f"tensor {recipe.stored[0]} has shape {list(found)} but config.json asks for {list(expected)}; "
                    "config.json does not belong to these weights"
                )
            filled[recipe.stored] = nn.Parameter(recipe.read(source, dtype).to(device), requires_grad=False)
        module.register_parameter(key, filled[recipe.stored])
    return tuple(stored for recipe in filled for stored in recipe)


def _fill_buffers(
    model: PreTrainedModel, source: TensorSource, family: Family, *, dtype: torch.dtype
) -> tuple[str, ...]:
    """Read buffers that a checkpoint may hold; gives the names of those that it does."""
    stored = tuple(name for name in family.stored_buffers if name in source.names())
    for name in stored:
        module_name, _, key = name.rpartition(".")
        model.get_submodule(module_name).register_buffer(key, source.read(name, dtype), persistent=False)
    return stored


def _share_if_equal(model: PreTrainedModel, family: Family) -> None:
    """Some checkpoints store a tied head a second time; one that differs is a head of its own, as in transformers."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    embedding, head = parameters.get(family.embedding[0]), parameters.get(family.head)
    if embedding is not None and head is not None and torch.equal(embedding, head):
        model.get_submodule(family.head.rpartition(".")[0]).register_parameter("weight", embedding)
