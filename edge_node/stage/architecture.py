"""How a transformers model is cut down to one stage.

Everything here works on the meta device: shapes and structure, no weight. ``build.py`` fills in the weights. What
differs between families is told by ``plutino.families``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from edge_node.stage.halves import cut_halves
from plutino.errors import ModelError
from plutino.families import Family, family_of
from plutino.family import Kind
from plutino.stand_ins import leave_out_entry

_NO_INTEGER = -1
"""Stands in integer buffers that are not computed yet; all are indices."""


# Shape suffixes: B rows, T tokens of this pass, S tokens seen so far with this pass, D hidden size.


def parse_config(values: Mapping[str, Any]) -> PretrainedConfig:
    """A model's configuration from the content of its config.json.

    Raises:
        ModelError: unknown family, or values that transformers refuses.
    """
    family = family_of(values.get("model_type"))
    try:
        return CONFIG_MAPPING[family.model_type].from_dict(dict(values))
    except (TypeError, ValueError) as error:
        raise ModelError(f"config.json is no valid {family.model_type} configuration: {error}") from error


_MADE_BY: Mapping[Kind, Any] = {
    "decoder": AutoModelForCausalLM,
    "encoder": AutoModelForSequenceClassification,
    "encoder-decoder": AutoModelForSeq2SeqLM,
}


def count_blocks(config: PretrainedConfig) -> tuple[int, int]:
    """Blocks of a model, and how many of them are an encoder-decoder's encoder (0 for other models)."""
    family = family_of(config.model_type)
    if family.halves is None:
        return int(config.num_hidden_layers), 0
    values = config.to_dict()
    return family.num_blocks(values), family.num_encoder_blocks(values)


def build_meta_model(config: PretrainedConfig, *, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """The whole model without a byte of weights: the class that predicts tokens, or sequences' labels if none does.

    Raises:
        ModelError: transformers cannot build it, for instance because it lacks the attention backend.
    """
    made_by: Any = _MADE_BY[family_of(config.model_type).kind]
    try:
        with torch.device("meta"):
            model = made_by.from_config(config, attn_implementation=attention, dtype=dtype)
    except (ImportError, ValueError) as error:
        raise ModelError(f"transformers cannot build the {config.model_type} model: {error}") from error
    assert isinstance(model, PreTrainedModel)
    return model


def list_block_linears(model: PreTrainedModel, family: Family) -> tuple[str, ...]:
    """Global names of all linear layers inside blocks that a method may adapt, in the model's order.

    Routers of experts and, where stock peft gives their names another meaning, plain MLPs are not among them.
    """
    return tuple(
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and family.in_block(name) in family.all_linears
    )


def cut_to_stage(
    model: PreTrainedModel, family: Family, start_block: int, end_block: int, *, has_lm_head: bool = True
) -> None:
    """Take from a whole meta model everything that is not part of the stage ``[start_block, end_block)``, in place.

    Blocks keep their global index as name, parts that are left out become pass-through modules, so that no name of
    what remains changes. Attention layers are renumbered from 0, because they index the stage's own KV cache.
    """
    config = model.config
    num_blocks, num_encoder_blocks = count_blocks(config)
    if family.halves is not None:
        ends = {"num_encoder_blocks": num_encoder_blocks, "num_blocks": num_blocks}
        cut_halves(model, family, start_block, end_block, **ends)
        _leave_out_head(model, family, has_lm_head=has_lm_head and end_block == num_blocks)
        return
    blocks_name = family.block_prefix.rstrip(".")
    blocks = model.get_submodule(blocks_name)

    own_blocks = nn.ModuleList()
    for local_index, block_index in enumerate(range(start_block, end_block)):
        block = blocks.get_submodule(str(block_index))
        own_blocks.add_module(str(block_index), block)
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = local_index  # type: ignore[assignment]
    model.set_submodule(blocks_name, own_blocks)

    modules = dict(model.named_modules())
    if start_block > 0:
        leave_out_entry(model, family)
    if end_block < num_blocks:
        for prefix in family.final:
            if prefix.rstrip(".") in modules:
                model.set_submodule(prefix.rstrip("."), nn.Identity())
    _leave_out_head(model, family, has_lm_head=has_lm_head and end_block == num_blocks)

    # Blocks hold on to the whole model's configuration; the models around them read it for their loops and the cache.
    local_config = _cut_config(config, family, start_block, end_block)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config = local_config


def _leave_out_head(model: PreTrainedModel, family: Family, *, has_lm_head: bool) -> None:
    if not family.head:
        # What a job trains in its place lies beside the model.
        assert family.score_head is not None
        model.set_submodule(family.score_head.module, nn.Identity())
    elif not has_lm_head:
        model.set_submodule(family.head.removesuffix(".weight"), nn.Identity())


@torch.no_grad()
def rebuild_buffers(model: PreTrainedModel) -> None:
    """Compute on the CPU what no checkpoint stores, such as rotary frequencies and the scale of embeddings.

    Raises:
        ModelError: a module's computed buffers do not follow from the configuration alone.
    """
    for name, module in list(model.named_modules()):
        computed = {key: buffer for key, buffer in module.named_buffers(recurse=False) if buffer.is_meta}
        if not computed:
            continue
        if not any(True for _ in module.parameters()) and hasattr(module, "config"):
            model.set_submodule(name, type(module)(config=module.config))
            continue
        # transformers' own rule, which fills buffers; the parameters beside them still are on the meta device.
        for key, buffer in computed.items():
            nothing = math.nan if buffer.is_floating_point() else _NO_INTEGER
            module.register_buffer(key, torch.full(buffer.shape, nothing, dtype=buffer.dtype), persistent=False)
        model._init_weights(module)
        left = [key for key in computed if _is_unfilled(module.get_buffer(key))]
        if left:
            raise ModelError(f"cannot compute the buffers {', '.join(left)} of {name}; this family needs own code")


def _is_unfilled(buffer: Tensor) -> bool:
    return bool((buffer.isnan() if buffer.is_floating_point() else buffer == _NO_INTEGER).any())


def make_position_ids(
    family: Family,
    attention_mask: Tensor | None,
    segment_ids: Tensor | None,
    shape: tuple[int, int],
    past_tokens: int = 0,
) -> Tensor:
    """Positions of the tokens of one pass, by the rule that transformers' own ``generate`` follows.

    Tokens count from 0 over what the attention mask lets through, padding gets 0; in packed rows every segment starts
    again. All families known so far share the rule; where a model's own count starts elsewhere, its first stage adds
    that.

    Args:
        family: the model's family.
        attention_mask: [B, S], 1 for tokens, 0 for padding, past tokens included; None if there is no padding.
        segment_ids: [B, T], segment of every token in packed rows; None: every row is one sequence.
        shape: rows and tokens of this pass.
        past_tokens: tokens in the KV cache.

    Returns:
        int64 positions [B, T].
    """
    num_rows, num_tokens = shape
    if segment_ids is not None:
        assert past_tokens == 0, "packed rows are never continued"
        index_T = torch.arange(num_tokens)
        is_start_BT = torch.ones(shape, dtype=torch.bool)
        is_start_BT[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
        start_BT = torch.where(is_start_BT, index_T, 0).cummax(dim=-1).values
        return index_T - start_BT
    if attention_mask is not None:
        assert attention_mask.shape == (num_rows, past_tokens + num_tokens)
        position_BS = (attention_mask.long().cumsum(dim=-1) - 1).masked_fill(attention_mask == 0, 0)
        return position_BS[:, past_tokens:]
    return torch.arange(past_tokens, past_tokens + num_tokens).expand(num_rows, num_tokens)


def make_packed_masks(
    config: PretrainedConfig,
    segment_ids_BT: Tensor,
    attention_mask_BT: Tensor | None,
    *,
    dtype: torch.dtype,
    attention: str,
) -> Tensor | dict[str, Tensor]:
    """What a model's ``forward`` takes as attention mask of packed rows.

    Returns:
        One mask, or a mask for each kind of block where the model mixes full attention and sliding windows.

    Raises:
        ModelError: the family makes its position biases from a padding mask, which cannot tell segments apart.
    """
    adds_alibi = family_of(config.model_type).adds_alibi
    if adds_alibi is not None and adds_alibi(config.to_dict()):
        raise ModelError(
            f"rows cannot be packed for this {config.model_type} model, because its attention biases count positions "
            "over the whole row; send one sequence a row"
        )

    def mask(window: int | None) -> Tensor:
        return make_packed_mask(segment_ids_BT, attention_mask_BT, dtype=dtype, attention=attention, window=window)

    window: int | None = getattr(config, "sliding_window", None)
    if getattr(config, "layer_types", None) is None:
        return mask(window)
    return {"full_attention": mask(None)} | ({} if window is None else {"sliding_attention": mask(window)})


def make_packed_mask(
    segment_ids_BT: Tensor,
    attention_mask_BT: Tensor | None,
    *,
    dtype: torch.dtype,
    attention: str,
    window: int | None = None,
) -> Tensor:
    """Block-diagonal causal mask of packed rows: tokens attend to the last ``window`` ones of their own segment.

    Padding forms a segment of its own, because a row of the mask without any token has no softmax.

    Returns:
        [B, 1, T, T]: boolean for sdpa (True attends), additive in ``dtype`` for eager.
    """
    if attention_mask_BT is not None:
        segment_ids_BT = segment_ids_BT.masked_fill(attention_mask_BT == 0, -1)
    num_tokens = segment_ids_BT.shape[1]
    is_seen_TT = torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril()
    if window is not None:
        is_seen_TT = is_seen_TT.triu(1 - window)
    mask_B1TT = ((segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]) & is_seen_TT).unsqueeze(1)
    if attention != "eager":
        return mask_B1TT
    return torch.zeros(mask_B1TT.shape, dtype=dtype).masked_fill(~mask_B1TT, torch.finfo(dtype).min)


def _cut_config(config: PretrainedConfig, family: Family, start_block: int, end_block: int) -> PretrainedConfig:
    local = copy.deepcopy(config)
    local.num_hidden_layers = end_block - start_block
    for field in family.per_block_config:
        values = getattr(local, field, None)
        if values is not None:
            setattr(local, field, values[start_block:end_block])
    return local
