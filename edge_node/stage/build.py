"""A stage: the Hugging Face model itself with only its own blocks, filled tensor by tensor.

:func:`build_stage` is the entry point. The model's own ``forward`` does masks, rotary embeddings and attention, so a
chain of stages computes bit for bit what the whole model computes. The backbone is frozen and always in evaluation
mode; methods attach what is trained.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import Cache, DynamicCache, PretrainedConfig, PreTrainedModel

from edge_node.methods.dropout import current_dropout_position, restored_dropout_position
from edge_node.stage.architecture import (
    build_meta_model,
    cut_to_stage,
    list_block_linears,
    make_packed_masks,
    parse_config,
    rebuild_buffers,
)
from edge_node.stage.packing import PackedCache, StagePacker
from edge_node.stage.past import FixedPast, Past, for_rows
from edge_node.stage.stored_names import StoredNames
from edge_node.stage.weights import ReadsAhead, TensorSource
from plutino.errors import ModelError
from plutino.families import Family, family_of
from plutino.job.model import PLAIN, Packing
from plutino.side_network import BackboneStates, BackboneTap, SideNetwork

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
    side: Tensor | None = None
    """fp32 [B, T, R], the previous stage's side state; None where no side network runs below."""
    attention_mask: Tensor | None = None
    """[B, tokens seen so far with this pass]: 1 for tokens, 0 for padding. None: no padding."""
    segment_ids: Tensor | None = None
    """int64 [B, T], segment of each token of packed rows, from 0 up; None: every row is one sequence."""
    num_prompt_tokens: int = 0
    """Virtual tokens that come before the rows' own in this pass: counted in the other fields' T, but for input_ids."""
    cache: Cache | None = None
    """KV cache of this stage, extended in place; None in training."""


@dataclass(frozen=True, slots=True)
class StageOutput:
    """What a stage makes of one micro-batch."""

    known_hidden: Tensor | None
    """[B, T, D]: on the last stage what the head reads; None where the blocks did not run and nobody needs it."""
    side: Tensor | None = None
    """fp32 [B, T, R], the side state; None where no side network runs, and on the last stage, which mixes it in."""
    states: BackboneStates | None = None
    """What a side network read of the blocks."""

    @property
    def hidden(self) -> Tensor:
        """The hidden states of blocks that did run."""
        assert self.known_hidden is not None, "the blocks did not run"
        return self.known_hidden

    @property
    def trained(self) -> Tensor | None:
        """The part that a gradient comes back for."""
        return self.known_hidden if self.side is None else self.side

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What the next stage gets, by name."""
        parts = {"hidden": self.known_hidden, "side": self.side}
        return {name: tensor.detach() for name, tensor in parts.items() if tensor is not None}


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

    def forward(self, *_: object, inputs_embeds: Tensor, **__: object) -> _KnownOutput:
        """Hand the input on."""
        return _KnownOutput(inputs_embeds)


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
        self.score_weight: nn.Parameter | None = None
        """[outputs, width] in fp32, of a score head that an objective trains; on the last stage only."""
        self.prompt: Tensor | None = None
        """[tokens, D], embeddings that a method puts before each row's; on the first stage only."""
        self.past: Past | None = None
        """Keys and values that a method puts before each row's. Inputs do not know of them: positions and masks of
        :class:`StageInput` are those of the rows' own tokens."""
        self.side: SideNetwork | None = None
        """A method's network beside these blocks, see :meth:`put_beside`."""
        self._tap: BackboneTap | None = None

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

    @property
    def boundary_width(self) -> int:
        """Numbers a token that cross a border of the stage, at most."""
        return int(self.config.hidden_size) + (0 if self.side is None else self.side.layout.side_width)

    def put_beside(self, side: SideNetwork) -> None:
        """Run a side network with every pass from now on."""
        self.side = side
        self._tap = BackboneTap(self.model, self.family, side)

    def run(self, inputs: StageInput) -> StageOutput:
        """The stage's whole pass: blocks, and the side network where one was put beside them.

        Blocks with a side network run without autograd: no gradient ever enters them.
        """
        if self.side is None or not self.side.is_enabled:
            return StageOutput(self.forward(inputs))
        assert self._tap is not None
        with torch.no_grad(), self._tap.recording() as states:
            hidden_BTD = self.forward(inputs)
        if self.is_last:
            states.final = hidden_BTD
        beside = self.run_beside(inputs, states)
        return beside if self.is_last else StageOutput(hidden_BTD, beside.side, states)

    def run_beside(self, inputs: StageInput, states: BackboneStates) -> StageOutput:
        """The side network's part of a pass, with what is known of the blocks; they do not run."""
        if self.side is None:
            return StageOutput(None)
        side_BTR = self.side(
            states,
            None if inputs.side is None else inputs.side.to(self.device),
            attention_mask=_move(self._mask(inputs, torch.float32), self.device),
            position_ids=inputs.position_ids.to(self.device),
            cache=inputs.cache,
        )
        if not self.is_last:
            return StageOutput(None, side_BTR, states)
        assert states.final is not None, "the last stage mixes into the final hidden states"
        return StageOutput(self.side.mix(states.final, side_BTR), None, states)

    def forward(self, inputs: StageInput) -> Tensor:
        """Hidden states [B, T, D] of the blocks alone: on the last stage after the final norm, before the head.

        Raises:
            ModelError: packed rows where they cannot be packed.
        """
        hidden_BTD = self._entry(inputs)
        if self.past is not None and self.past.num_tokens:
            inputs = self._behind(self.past, inputs, len(hidden_BTD))
        mask = self._mask(inputs, hidden_BTD.dtype)
        output = self.model.base_model(
            inputs_embeds=hidden_BTD,
            attention_mask=_move(mask, self.device),
            position_ids=inputs.position_ids.to(self.device),
            past_key_values=inputs.cache,
            use_cache=inputs.cache is not None,
        )
        return cast(Tensor, output.last_hidden_state)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., D] of the last stage, in the model's dtype.

        The model's own ``forward`` computes them, with whatever it does beside the product (soft caps, scales); only
        the part below the head is left out.
        """
        assert self.is_last, f"blocks [{self.start_block}, {self.end_block}) of {self.num_blocks} have no head"
        # Made anew because methods put other modules in the head's place.
        above_blocks = copy.copy(self.model)
        above_blocks._modules = dict(self.model._modules) | {self.model.base_model_prefix: _GivesItsInput()}
        rows = hidden.unsqueeze(0) if hidden.dim() == 2 else hidden
        logits = cast(Tensor, above_blocks(inputs_embeds=rows, use_cache=False).logits)
        return logits.squeeze(0) if hidden.dim() == 2 else logits

    def score(self, hidden: Tensor) -> Tensor:
        """Outputs [..., outputs] in fp32 of the score head for hidden states [..., D] of the last stage."""
        assert self.score_weight is not None, "no score head is attached"
        return functional.linear(hidden.float(), self.score_weight)

    def _mask(self, inputs: StageInput, dtype: torch.dtype) -> Tensor | dict[str, Tensor] | None:
        if inputs.segment_ids is None:
            return inputs.attention_mask
        return make_packed_masks(
            self.config, inputs.segment_ids, inputs.attention_mask, dtype=dtype, attention=self.attention
        )

    def new_cache(self) -> Cache:
        """An empty KV cache for this stage's blocks."""
        return DynamicCache(config=self.model.config)

    def _behind(self, past: Past, inputs: StageInput, num_rows: int) -> StageInput:
        """The input with the past before every row, as its cache, in its mask and in its positions."""
        if inputs.segment_ids is not None:
            raise ModelError("packed rows have no place for virtual tokens; send one sequence a row")
        cache = inputs.cache
        if cache is None:
            cache = FixedPast(for_rows(past, num_rows, self.dtype))
        elif not cache.get_seq_length():
            for index, (keys, values) in enumerate(for_rows(past, num_rows, self.dtype)):
                cache.update(keys, values, index)
        mask = inputs.attention_mask
        if mask is not None:
            # Before the padding, which positions pass over.
            mask = torch.cat([mask.new_ones(num_rows, past.num_tokens), mask], dim=1)
        return replace(inputs, cache=cache, attention_mask=mask, position_ids=inputs.position_ids + past.num_tokens)

    def _entry(self, inputs: StageInput) -> Tensor:
        if not self.is_first:
            assert inputs.hidden is not None, "a later stage needs the previous stage's hidden states"
            # What comes over a wire lies on the CPU; autograd brings its gradient back there.
            return inputs.hidden.to(self.device)
        assert inputs.input_ids is not None, "the first stage needs token ids"
        embedded_BTD = cast(Tensor, self.model.get_submodule(self.embedding_name)(inputs.input_ids.to(self.device)))
        if not inputs.num_prompt_tokens:
            return embedded_BTD
        assert self.prompt is not None and len(self.prompt) == inputs.num_prompt_tokens, "no such prompt is attached"
        prompt_BTD = self.prompt.to(embedded_BTD.dtype).expand(len(embedded_BTD), -1, -1)
        return torch.cat([prompt_BTD, embedded_BTD], dim=1)


def _move(mask: Tensor | dict[str, Tensor] | None, device: torch.device) -> Tensor | dict[str, Tensor] | None:
    if isinstance(mask, dict):
        return {kind: each.to(device) for kind, each in mask.items()}
    return None if mask is None else mask.to(device)


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

    Raises:
        ModelError: unknown family, blocks that the model does not have, or tensors missing or of another shape.
        QuantizationError: a layer cannot be packed as asked.
    """
    config = parse_config(source.config())
    num_blocks: int = config.num_hidden_layers
    if not 0 <= start_block < end_block <= num_blocks:
        raise ModelError(f"blocks [{start_block}, {end_block}) were asked of a model with blocks [0, {num_blocks})")
    family = family_of(config.model_type)
    attention = attention or family.attention
    model = build_meta_model(config, dtype=dtype, attention=attention)
    block_linears = list_block_linears(model, family)
    cut_to_stage(model, family, start_block, end_block, has_lm_head=has_lm_head)
    rebuild_buffers(model)
    bytes_before = source.bytes_read
    is_tied = bool(config.tie_word_embeddings)
    stored_names = StoredNames(model, source.names(), family, is_tied=is_tied)
    packer = StagePacker(source, stored_names.find, packing, dtype=dtype, device=device, cache=cache)
    own_linears = [name for name in block_linears if name.startswith(_block_prefixes(family, start_block, end_block))]
    packed_linears = own_linears if packing.scheme != "none" else ()
    names = _check_complete(model, stored_names, packer, packed_linears)
    if isinstance(source, ReadsAhead):
        source.prepare(stored for name in names if not packer.is_kept(name) for stored in stored_names.pieces(name))
    packer.pack_linears(model, own_linears)
    packer.pack_outer(
        model,
        family.embedding[0].removesuffix(".weight") if start_block == 0 else None,
        family.head.removesuffix(".weight") if end_block == num_blocks and has_lm_head else None,
    )
    names_read = (*packer.names_read, *_fill(model, source, stored_names, dtype=dtype, device=device))
    if is_tied:
        _share_if_equal(model, family)
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


def _share_if_equal(model: PreTrainedModel, family: Family) -> None:
    """Some checkpoints store a tied head a second time; one that differs is a head of its own, as in transformers."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    embedding, head = parameters.get(family.embedding[0]), parameters.get(family.head)
    if embedding is not None and head is not None and torch.equal(embedding, head):
        model.get_submodule(family.head.rpartition(".")[0]).register_parameter("weight", embedding)


def _checkpoint_block(block: nn.Module) -> None:
    """Make a block drop its activations and recompute them in the backward pass (Chen et al. 2016, arXiv:1604.06174).

    The block's ``forward`` is replaced on the instance: a wrapper module would change the names of all its parameters.
    """
    forward: Callable[..., Any] = block.forward

    def forward_with_checkpointing(*args: Any, **kwargs: Any) -> Any:
        # One that grows would grow a second time.
        has_growing_cache = any(
            isinstance(value, Cache) and not isinstance(value, FixedPast) for value in (*args, *kwargs.values())
        )
        if has_growing_cache or not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        position = current_dropout_position()

        def recompute(*args: Any, **kwargs: Any) -> Any:
            # The backward pass may run in another thread and while another micro-batch's position is set.
            with restored_dropout_position(position):
                return forward(*args, **kwargs)

        # The backbone draws no random numbers and dropout is seeded by position: no generator state to keep.
        return checkpoint(recompute, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    block.forward = forward_with_checkpointing
