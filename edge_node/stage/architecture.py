"""What plutino knows of a transformers model beyond its tensors' names, and how a model is cut down to one stage.

One entry in :data:`ARCHITECTURES` per family of ``plutino.families``. Everything here works on the meta device: shapes
and structure, no weight. ``build.py`` fills in the weights.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from plutino.errors import ModelError
from plutino.families import Family, family_of


# Shape suffixes: B rows, T tokens of this pass, S tokens seen so far with this pass, D hidden size.
@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """What a family's ``forward`` does that a stage in the middle of the model must know."""

    entry_sums: tuple[str, ...] = ()
    """Modules whose output ``forward`` adds to the embeddings: later stages must not add it a second time."""
    per_block_config: tuple[str, ...] = ("layer_types",)
    """Config fields that are lists with one entry per block."""
    has_conv1d: bool = False
    """Linear layers are transformers' Conv1D: weights [in, out] instead of [out, in]."""


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(),
    "gpt2": Architecture(entry_sums=("transformer.wpe",), has_conv1d=True),
}


def architecture_of(family: Family) -> Architecture:
    """The entry of a family."""
    return ARCHITECTURES[family.model_type]


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


def build_meta_model(config: PretrainedConfig, *, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """The whole causal language model without a byte of weights.

    Raises:
        ModelError: transformers cannot build it, for instance because it lacks the attention backend.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
    except (ImportError, ValueError) as error:
        raise ModelError(f"transformers cannot build the {config.model_type} model: {error}") from error
    assert isinstance(model, PreTrainedModel)
    return model


def list_block_linears(model: PreTrainedModel, family: Family) -> tuple[str, ...]:
    """Global names of all linear layers inside blocks, in the model's order."""
    return tuple(
        name
        for name, module in model.named_modules()
        if name.startswith(family.block_prefix) and isinstance(module, nn.Linear | Conv1D)
    )


def cut_to_stage(model: PreTrainedModel, family: Family, start_block: int, end_block: int) -> None:
    """Take from a whole meta model everything that is not part of the stage ``[start_block, end_block)``, in place.

    Blocks keep their global index as name, parts that are left out become pass-through modules, so that no name of
    what remains changes. Attention layers are renumbered from 0, because they index the stage's own KV cache.
    """
    config = model.config
    num_blocks: int = config.num_hidden_layers
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

    if start_block > 0:
        for tensor in family.embedding:
            name = tensor.removesuffix(".weight")
            is_summed = name in architecture_of(family).entry_sums
            model.set_submodule(name, AddsNothing() if is_summed else nn.Identity())
    if end_block < num_blocks:
        for prefix in family.final:
            model.set_submodule(prefix.rstrip("."), nn.Identity())
        model.set_submodule(family.head.removesuffix(".weight"), nn.Identity())

    # Blocks hold on to the whole model's configuration; the models around them read it for their loops and the cache.
    local_config = _cut_config(config, architecture_of(family), start_block, end_block)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config = local_config


def rebuild_buffers(model: PreTrainedModel) -> None:
    """Compute on the CPU what no checkpoint stores, such as rotary frequencies.

    Raises:
        ModelError: a module holds computed buffers and cannot be built from the configuration alone.
    """
    for name, module in list(model.named_modules()):
        computed = [key for key, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        if not computed:
            continue
        if any(True for _ in module.parameters()) or not hasattr(module, "config"):
            raise ModelError(f"cannot compute the buffers {', '.join(computed)} of {name}; this family needs own code")
        model.set_submodule(name, type(module)(config=module.config))


class AddsNothing(nn.Module):
    """Stands where ``forward`` adds position embeddings that the first stage has added already.

    Its output is negative zero, the one number whose sum with any other leaves every bit as it was: 0.0 would turn
    -0.0 into 0.0.
    """

    def forward(self, *_: object) -> Tensor:
        """Give a scalar, which takes part in no dtype promotion."""
        return torch.tensor(-0.0)


def make_position_ids(
    family: Family,
    attention_mask: Tensor | None,
    segment_ids: Tensor | None,
    shape: tuple[int, int],
    past_tokens: int = 0,
) -> Tensor:
    """Positions of the tokens of one pass, by the rule that transformers' own ``generate`` follows.

    Tokens count from 0 over what the attention mask lets through, padding gets 0; in packed rows every segment starts
    again. All families known so far share the rule.

    Args:
        family: the model's family.
        attention_mask: [B, S], 1 for tokens, 0 for padding, past tokens included; None if there is no padding.
        segment_ids: [B, T], segment of every token in packed rows; None: every row is one sequence.
        shape: rows and tokens of this pass.
        past_tokens: tokens in the KV cache.

    Returns:
        int64 positions [B, T].
    """
    assert family.model_type in ARCHITECTURES
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


def make_packed_mask(
    segment_ids_BT: Tensor, attention_mask_BT: Tensor | None, *, dtype: torch.dtype, attention: str
) -> Tensor:
    """Block-diagonal causal mask of packed rows: tokens attend to earlier ones of their own segment.

    Padding forms a segment of its own, because a row of the mask without any token has no softmax.

    Returns:
        [B, 1, T, T]: boolean for sdpa (True attends), additive in ``dtype`` for eager.
    """
    if attention_mask_BT is not None:
        segment_ids_BT = segment_ids_BT.masked_fill(attention_mask_BT == 0, -1)
    num_tokens = segment_ids_BT.shape[1]
    is_causal_TT = torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril()
    mask_B1TT = ((segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]) & is_causal_TT).unsqueeze(1)
    if attention != "eager":
        return mask_B1TT
    return torch.zeros(mask_B1TT.shape, dtype=dtype).masked_fill(~mask_B1TT, torch.finfo(dtype).min)


def _cut_config(
    config: PretrainedConfig, architecture: Architecture, start_block: int, end_block: int
) -> PretrainedConfig:
    local = copy.deepcopy(config)
    local.num_hidden_layers = end_block - start_block
    for field in architecture.per_block_config:
        values = getattr(local, field, None)
        if values is not None:
            setattr(local, field, values[start_block:end_block])
    return local
