"""A stage: the Hugging Face model itself with only its own blocks, filled tensor by tensor.

:func:`build_stage` is the entry point. The model's own ``forward`` does masks, rotary embeddings and attention, so a
chain of stages computes bit for bit what the whole model computes. The backbone is frozen and always in evaluation
mode; methods attach what is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, DynamicCache, PretrainedConfig, PreTrainedModel

from edge_node.methods.dropout import current_dropout_position, restored_dropout_position
from edge_node.stage.architecture import (
    build_meta_model,
    cut_to_stage,
    list_block_linears,
    make_packed_mask,
    parse_config,
    rebuild_buffers,
)
from edge_node.stage.packing import FindStored, PackedCache, StagePacker
from edge_node.stage.weights import TensorSource
from plutino.errors import ModelError
from plutino.families import Family, family_of
from plutino.job.model import PLAIN, Packing

COMPUTE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Dtypes of weights and computation, by their names in job specs."""

_CPU = torch.device("cpu")


# Shape suffixes: B rows, T tokens of this pass, D hidden size, V vocabulary.
@dataclass(frozen=True, slots=True, kw_only=True)
class StageInput:
    """What one micro-batch brings to a stage."""

    position_ids: Tensor
    """int64 [B, T], from :func:`edge_node.stage.architecture.make_position_ids`."""
    input_ids: Tensor | None = None
    """int64 [B, T] on the first stage, None on the others."""
    hidden: Tensor | None = None
    """[B, T, D], the previous stage's output; None on the first stage."""
    attention_mask: Tensor | None = None
    """[B, tokens seen so far with this pass]: 1 for tokens, 0 for padding. None: no padding."""
    segment_ids: Tensor | None = None
    """int64 [B, T], segment of each token of packed rows, from 0 up; None: every row is one sequence."""
    cache: Cache | None = None
    """KV cache of this stage, extended in place; None in training."""


class Stage:
    """Blocks ``[start_block, end_block)`` of a causal language model, frozen and in evaluation mode."""

    def __init__(
        self,
        model: PreTrainedModel,
        config: PretrainedConfig,
        start_block: int,
        end_block: int,
        *,
        dtype: torch.dtype,
        attention: str,
        packing: Packing,
        device: torch.device,
        block_linears: tuple[str, ...],
        tensor_names_read: tuple[str, ...],
        bytes_read: int,
    ) -> None:
        self.model = model
        """The transformers model holding only its own parts, under their global names."""
        self.config = config
        """Configuration of the whole model."""
        self.family: Family = family_of(config.model_type)
        self.start_block = start_block
        self.end_block = end_block
        self.num_blocks: int = config.num_hidden_layers
        """Blocks of the whole model."""
        self.dtype = dtype
        self.attention = attention
        self.packing = packing
        """How its frozen weights are held."""
        self.device = device
        self.block_linears = block_linears
        """Global names of the linear layers of all blocks, other stages' included."""
        self.tensor_names_read = tensor_names_read
        """Names, as stored, of the tensors that were read."""
        self.bytes_read = bytes_read
        """Stored bytes that were read."""

    @property
    def is_first(self) -> bool:
        """Whether the stage holds the embedding."""
        return self.start_block == 0

    @property
    def is_last(self) -> bool:
        """Whether the stage holds the final norm and the head."""
        return self.end_block == self.num_blocks

    @property
    def tensors_read(self) -> int:
        """Number of stored tensors that were read."""
        return len(self.tensor_names_read)

    @property
    def embedding_name(self) -> str:
        """Global name of the token embedding module."""
        return self.family.embedding[0].removesuffix(".weight")

    @property
    def head_name(self) -> str:
        """Global name of the output head module."""
        return self.family.head.removesuffix(".weight")

    @property
    def is_tied(self) -> bool:
        """Whether head and token embedding are one parameter of the model."""
        return bool(self.config.tie_word_embeddings)

    def forward(self, inputs: StageInput) -> Tensor:
        """Hidden states [B, T, D]: on the last stage after the final norm, before the head."""
        hidden_BTD = self._entry(inputs)
        mask = inputs.attention_mask
        if inputs.segment_ids is not None:
            mask = make_packed_mask(inputs.segment_ids, mask, dtype=hidden_BTD.dtype, attention=self.attention)
        output = self.model.base_model(
            inputs_embeds=hidden_BTD,
            attention_mask=None if mask is None else mask.to(self.device),
            position_ids=inputs.position_ids.to(self.device),
            past_key_values=inputs.cache,
            use_cache=inputs.cache is not None,
        )
        return cast(Tensor, output.last_hidden_state)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., D] of the last stage, in the model's dtype."""
        assert self.is_last, f"blocks [{self.start_block}, {self.end_block}) of {self.num_blocks} have no head"
        return cast(Tensor, self.model.get_submodule(self.head_name)(hidden))

    def new_cache(self) -> Cache:
        """An empty KV cache for this stage's blocks."""
        return DynamicCache(config=self.model.config)

    def _entry(self, inputs: StageInput) -> Tensor:
        if not self.is_first:
            assert inputs.hidden is not None, "a later stage needs the previous stage's hidden states"
            # What comes over a wire lies on the CPU; autograd brings its gradient back there.
            return inputs.hidden.to(self.device)
        assert inputs.input_ids is not None, "the first stage needs token ids"
        return cast(Tensor, self.model.get_submodule(self.embedding_name)(inputs.input_ids.to(self.device)))


def build_stage(
    source: TensorSource,
    start_block: int,
    end_block: int,
    *,
    dtype: torch.dtype,
    attention: str = "sdpa",
    checkpointing: bool = False,
    packing: Packing = PLAIN,
    device: torch.device = _CPU,
    cache: PackedCache | None = None,
) -> Stage:
    """Load blocks ``[start_block, end_block)``, with the embedding if first, the final norm and the head if last.

    The model is built on the meta device and its own tensors are read one by one: memory peaks at the stage's weights
    as they are held plus one matrix in its stored dtype. No tensor outside the stage is read.

    Args:
        source: the model's configuration and tensors.
        start_block: first block.
        end_block: one past the last block.
        dtype: dtype of weights and computation.
        attention: transformers' attention backend, sdpa or eager.
        checkpointing: recompute each block in the backward pass instead of keeping its activations.
        packing: how frozen weights are held.
        device: where the stage computes.
        cache: packed tensors that earlier jobs left on this device.

    Raises:
        ModelError: unknown family, blocks that the model does not have, or tensors missing or of another shape.
        QuantizationError: a layer cannot be packed as asked.
    """
    config = parse_config(source.config())
    num_blocks: int = config.num_hidden_layers
    if not 0 <= start_block < end_block <= num_blocks:
        raise ModelError(f"blocks [{start_block}, {end_block}) were asked of a model with blocks [0, {num_blocks})")
    family = family_of(config.model_type)
    model = build_meta_model(config, dtype=dtype, attention=attention)
    block_linears = list_block_linears(model, family)
    cut_to_stage(model, family, start_block, end_block)
    rebuild_buffers(model)
    bytes_before = source.bytes_read
    find_stored = partial(_stored_name, stored=source.names(), family=family, is_tied=bool(config.tie_word_embeddings))
    packer = StagePacker(source, find_stored, packing, dtype=dtype, device=device, cache=cache)
    own_linears = [name for name in block_linears if name.startswith(_block_prefixes(family, start_block, end_block))]
    _check_complete(model, find_stored, packer, own_linears if packing.scheme != "none" else ())
    packer.pack_linears(model, own_linears)
    packer.pack_outer(
        model,
        family.embedding[0].removesuffix(".weight") if start_block == 0 else None,
        family.head.removesuffix(".weight") if end_block == num_blocks else None,
    )
    names_read = (*packer.names_read, *_fill(model, source, find_stored, dtype=dtype, device=device))
    nn.Module.to(model, device)
    model.eval()
    model.requires_grad_(False)
    if checkpointing:
        for block in model.get_submodule(family.block_prefix.rstrip(".")).children():
            _checkpoint_block(block)
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
    )


def _block_prefixes(family: Family, start_block: int, end_block: int) -> tuple[str, ...]:
    return tuple(f"{family.block_prefix}{block}." for block in range(start_block, end_block))


def _check_complete(
    model: PreTrainedModel, find_stored: FindStored, packer: StagePacker, packed_linears: Sequence[str]
) -> None:
    """Refuse a checkpoint that lacks tensors of a meta model's parameters, before anything is read."""
    packed_weights = {f"{linear}.weight" for linear in packed_linears}
    names = [name for name, _ in model.named_parameters(remove_duplicate=False) if name not in packed_weights]
    wanted: dict[str, str | None] = {name: find_stored(name) for name in names}
    for linear in packed_linears:
        wanted |= {f"{linear}.{part}": stored for part, stored in packer.stored_parts(linear).items()}
    missing = [name for name, stored in wanted.items() if stored is None]
    if missing:
        raise ModelError(
            f"the checkpoint lacks {len(missing)} of the stage's {len(wanted)} tensors: {', '.join(missing[:8])}"
            f"{', ...' if len(missing) > 8 else ''}; download it again, or check that config.json belongs to it"
        )


def _fill(
    model: PreTrainedModel, source: TensorSource, find_stored: FindStored, *, dtype: torch.dtype, device: torch.device
) -> tuple[str, ...]:
    """Read every parameter that is still meta; two that come from one stored tensor share one parameter."""
    filled: dict[str, nn.Parameter] = {}
    for name in [name for name, p in model.named_parameters(remove_duplicate=False) if p.is_meta]:
        stored = cast(str, find_stored(name))
        module_name, _, key = name.rpartition(".")
        module = model.get_submodule(module_name)
        if stored not in filled:
            expected, found = tuple(module.get_parameter(key).shape), source.shape(stored)
            if expected != found:
                raise ModelError(
                    f"tensor {stored} has shape {list(found)} but config.json asks for {list(expected)}; "
                    "config.json does not belong to these weights"
                )
            filled[stored] = nn.Parameter(source.read(stored, dtype).to(device), requires_grad=False)
        module.register_parameter(key, filled[stored])
    return tuple(filled)


def _stored_name(name: str, *, stored: set[str], family: Family, is_tied: bool) -> str | None:
    """Name under which the checkpoint holds a parameter, or None if it does not."""
    candidates = [name]
    if is_tied and name in (family.head, family.embedding[0]):
        # Which of the two a checkpoint keeps is up to whoever saved it.
        candidates.append(family.embedding[0] if name == family.head else family.head)
    for candidate in candidates:
        for spelling in (candidate, candidate.removeprefix(family.optional_prefix)):
            if spelling in stored:
                return spelling
    return None


def _checkpoint_block(block: nn.Module) -> None:
    """Make a block drop its activations and recompute them in the backward pass (Chen et al. 2016, arXiv:1604.06174).

    The block's ``forward`` is replaced on the instance: a wrapper module would change the names of all its parameters.
    """
    forward: Callable[..., Any] = block.forward

    def forward_with_checkpointing(*args: Any, **kwargs: Any) -> Any:
        has_cache = any(isinstance(value, Cache) for value in (*args, *kwargs.values()))
        if has_cache or not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        position = current_dropout_position()

        def recompute(*args: Any, **kwargs: Any) -> Any:
            # The backward pass may run in another thread and while another micro-batch's position is set.
            with restored_dropout_position(position):
                return forward(*args, **kwargs)

        # The backbone draws no random numbers and dropout is seeded by position: no generator state to keep.
        return checkpoint(recompute, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    block.forward = forward_with_checkpointing
