"""A stage at run time: some blocks of the Hugging Face model itself, and what a pass through them takes and gives.

The model's own ``forward`` does masks, rotary embeddings and attention, so a chain of stages computes bit for bit what
the whole model computes. :func:`edge_node.stage.build.build_stage` makes one; methods attach what is trained.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import Cache, DynamicCache, PretrainedConfig, PreTrainedModel

from edge_node.stage.architecture import count_blocks, make_packed_masks
from edge_node.stage.frozen_prefix import FrozenPrefix
from edge_node.stage.gradient_start import GradientStart
from edge_node.stage.halves import new_halves_cache, run_halves
from edge_node.stage.head import logits_of
from edge_node.stage.passes import FrozenPass, StageInput, StageOutput
from edge_node.stage.past import FixedPast, Past, for_rows
from edge_node.stage.rounding import round_inputs
from plutino.errors import ActivationCacheError, ModelError
from plutino.families import Family, family_of
from plutino.job.model import Packing
from plutino.side_halves import run_ladders
from plutino.side_layout import SideLayout
from plutino.side_network import BackboneStates, BackboneTap, SideNetwork

# Shape suffixes: B rows, T tokens of this pass, D hidden size, V vocabulary.


class Stage:
    """Blocks ``[start_block, end_block)`` of a model, frozen and in evaluation mode."""

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
        has_backbone: bool = True,
        has_own_head: bool = False,
    ) -> None:
        self.model = model
        """The transformers model holding only its own parts, under their global names."""
        self.config = config
        """Configuration of the whole model."""
        self.family: Family = family_of(config.model_type)
        self.start_block = start_block
        self.end_block = end_block
        self.num_blocks, self.num_encoder_blocks = count_blocks(config)
        """Blocks of the whole model, and those of them that are an encoder-decoder's encoder."""
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
        self.has_backbone = has_backbone
        """Whether the blocks are here; without them :meth:`run_beside` alone works."""
        self.score_head: nn.Module | None = None
        """[rows, width] in fp32 to [rows, outputs], trained by an objective; on the last stage only."""
        self.prompt: Tensor | None = None
        """[tokens, D], embeddings that a method puts before each row's; on the first stage only."""
        self.past: Past | None = None
        """Keys and values that a method puts before each row's. Inputs do not know of them: positions and masks of
        :class:`StageInput` are those of the rows' own tokens."""
        self.side: SideNetwork | None = None
        """A method's network beside these blocks, see :meth:`put_beside`."""
        self.side_layout: SideLayout | None = None
        """Of the job's whole side network, also on stages that have no part of it."""
        self.gradient_start: GradientStart | None = None
        """Gives the side network its first values in the job's first step; None: it has them."""
        self.kept_place: int | None = None
        """See :meth:`keep_below`."""
        self.frozen_prefix: FrozenPrefix | None = None
        self._has_own_head = has_own_head
        self._tap: BackboneTap | None = None
        self._rounding: list[RemovableHandle] = []
        self._rounded_borders: frozenset[int] = frozenset()

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
    def has_decoder_blocks(self) -> bool:
        """Whether blocks of an encoder-decoder's decoder are here, which look at the encoder's output."""
        return self.family.halves is not None and self.end_block > self.num_encoder_blocks

    @property
    def head_name(self) -> str:
        """Global name of the output head module."""
        return self.family.head.removesuffix(".weight")

    @property
    def is_tied(self) -> bool:
        """Whether head and token embedding are one parameter of the model."""
        return bool(self.family.head) and bool(self.config.tie_word_embeddings) and not self._has_own_head

    @property
    def boundary_width(self) -> int:
        """Numbers a token that cross a border of the stage, at most."""
        # The longest source and the longest target of a micro-batch may be in different rows.
        num_streams = 1 if self.family.halves is None else 2
        side_width = 0 if self.side is None else self.side.layout.side_width
        return num_streams * (int(self.config.hidden_size) + side_width)

    def put_beside(self, side: SideNetwork) -> None:
        """Run a side network with every pass from now on."""
        self.side = side
        self._tap = BackboneTap(self.model, self.family, side) if self.has_backbone else None

    def keep_below(self, place: int) -> None:
        """Nothing below a block is trained: from now on passes give what it gets, and may leave out what lies below."""
        self.kept_place = place
        if self.start_block <= place < self.end_block:
            self.frozen_prefix = FrozenPrefix(self.model, self.family, self.start_block, place, self.num_encoder_blocks)
            self.frozen_prefix.is_rounded = place in self._rounded_borders

    def round_at(self, borders: Iterable[int]) -> None:
        """Round hidden states to bf16 at these block borders, as a codec does where a stage ends there.

        Borders outside the stage, and those that it begins or ends with, are not its own to round.
        """
        for handle in self._rounding:
            handle.remove()
        self._rounded_borders = frozenset(borders)
        if self.frozen_prefix is not None:
            self.frozen_prefix.is_rounded = self.kept_place in self._rounded_borders
        inside = [b for b in self._rounded_borders if self.has_backbone and self.start_block < b < self.end_block]
        self._rounding = round_inputs(self.model.get_submodule(f"{self.family.block_prefix}{b}") for b in inside)

    def run(self, inputs: StageInput) -> StageOutput:
        """The stage's whole pass: blocks, and the side network where one was put beside them.

        Blocks with a side network run without autograd: no gradient ever enters them.
        """
        if self.frozen_prefix is not None:
            with self.frozen_prefix.recording() as states:
                output = self._alone(inputs)
            states.source = output.source
            return replace(output, states=states)
        return self.run_on(inputs, self.run_frozen(inputs)) if self.runs_beside else self._alone(inputs)

    @property
    def runs_beside(self) -> bool:
        """Whether a pass is one of frozen blocks and then one of the side network that reads them."""
        return self.side is not None and self.side.is_enabled and self._tap is not None

    def run_frozen(self, inputs: StageInput) -> FrozenPass:
        """The first half of a pass where :attr:`runs_beside`: the blocks, with what the side network will read."""
        assert self._tap is not None, "no side network reads the blocks"
        with torch.no_grad(), self._tap.recording() as states:
            output = self._alone(inputs)
        if self.is_last:
            states.final = output.hidden
        return FrozenPass(output, states)

    def run_on(self, inputs: StageInput, frozen: FrozenPass) -> StageOutput:
        """The second half: the side network, on what :meth:`run_frozen` gave."""
        beside = self.run_beside(inputs, frozen.states)
        hidden_BTD = beside.hidden if self.is_last else frozen.output.hidden
        return replace(beside, known_hidden=hidden_BTD, source=frozen.output.source)

    def _alone(self, inputs: StageInput) -> StageOutput:
        """The pass of the blocks, without anything beside them."""
        return StageOutput(self.forward(inputs)) if self.family.halves is None else self._halves_alone(inputs)

    def _halves_alone(self, inputs: StageInput) -> StageOutput:
        self._require_backbone()
        source_BSD = inputs.source
        if self.is_first and inputs.input_ids is not None:
            source_BSD = self.model.get_submodule(self.embedding_name)(inputs.input_ids.to(self.device))
        source_BSD, target_BTD = run_halves(
            self.model,
            self.family,
            None if source_BSD is None else source_BSD.to(self.device),
            self._target_entry(inputs),
            source_mask_BS=None if inputs.attention_mask is None else inputs.attention_mask.to(self.device),
            cache=inputs.cache,
            has_new_source=inputs.has_new_source,
        )
        return StageOutput(target_BTD, source=source_BSD)

    def _target_entry(self, inputs: StageInput) -> Tensor:
        """An encoder-decoder's target [B, T, D] as the stage gets it; the first stage embeds it."""
        if inputs.hidden is not None:
            return inputs.hidden.to(self.device)
        assert self.is_first and inputs.target_ids is not None, (
            "the first stage needs a target's ids, others its states"
        )
        return cast(Tensor, self.model.get_submodule(self.embedding_name)(inputs.target_ids.to(self.device)))

    def run_known(self, inputs: StageInput, states: BackboneStates) -> StageOutput:
        """The stage's pass with what the activation cache knows of frozen blocks, which do not run."""
        if self.kept_place is None:
            return self.run_beside(inputs, states)
        if self.end_block <= self.kept_place:
            # A decoder whose blocks all run begins with embeddings, which the first stage alone has.
            return StageOutput(self._target_entry(inputs) if self.kept_place < self.num_encoder_blocks else None)
        if self.frozen_prefix is None:
            return self._alone(inputs)
        with self.frozen_prefix.left_out(inputs, states, self.device) as from_place:
            return self._alone(from_place)

    def run_beside(self, inputs: StageInput, states: BackboneStates) -> StageOutput:
        """The side network's part of a pass, with what is known of the blocks; they do not run."""
        if self.side is None:
            return StageOutput(None)
        side_BTR = None if inputs.side is None else inputs.side.to(self.device)
        source_side_BSR = None if inputs.source_side is None else inputs.source_side.to(self.device)
        if self.family.halves is not None:
            source_side_BSR, side_BTR = run_ladders(
                self.side,
                states,
                source_side_BSR,
                side_BTR,
                source_mask_BS=None if inputs.attention_mask is None else inputs.attention_mask.to(self.device),
                cache=inputs.cache,
                parts="both" if inputs.has_new_source else "target",
            )
        else:
            side_BTR = self.side(
                states,
                side_BTR,
                attention_mask=_move(self._mask(inputs, torch.float32), self.device),
                position_ids=inputs.position_ids.to(self.device),
                cache=inputs.cache,
            )
        if not self.is_last:
            return StageOutput(None, side_BTR, states, source_side=source_side_BSR)
        assert states.final is not None and side_BTR is not None, "the last stage mixes into the final hidden states"
        return StageOutput(self.side.mix(states.final, side_BTR), None, states, source_side=source_side_BSR)

    def forward(self, inputs: StageInput) -> Tensor:
        """Hidden states [B, T, D] of the blocks alone: on the last stage after the final norm, before the head.

        Raises:
            ModelError: packed rows where they cannot be packed.
            ActivationCacheError: the blocks are not here.
        """
        self._require_backbone()
        hidden_BTD = self._entry(inputs)
        if self.past is not None and self.past.num_tokens:
            inputs = self._behind(self.past, inputs, len(hidden_BTD))
        mask = self._mask(inputs, hidden_BTD.dtype)
        output = self.model.base_model(
            inputs_embeds=hidden_BTD,
            attention_mask=_move(mask, self.device),
            position_ids=self._positions(inputs).to(self.device),
            past_key_values=inputs.cache,
            use_cache=inputs.cache is not None,
            **({} if inputs.token_types is None else {"token_type_ids": inputs.token_types.to(self.device)}),
        )
        return cast(Tensor, output.last_hidden_state)

    def _require_backbone(self) -> None:
        if not self.has_backbone:
            raise ActivationCacheError(
                "this worker trains from the activation cache, which lacks rows of the step; the job goes back to the "
                "pipeline, where their blocks run"
            )

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., D] of the last stage, in the model's dtype.

        The model's own ``forward`` computes them, with whatever it does beside the product (soft caps, scales); only
        the part below the head is left out.
        """
        assert self.is_last, f"blocks [{self.start_block}, {self.end_block}) of {self.num_blocks} have no head"
        return logits_of(self.model, self.family, hidden)

    def score(self, hidden_BD: Tensor) -> Tensor:
        """Outputs [B, outputs] in fp32 of the score head for one token's hidden states of each row."""
        assert self.score_head is not None and self.family.score_head is not None, "no score head is attached"
        if self.family.score_head.pooler:
            hidden_BD = self.model.get_submodule(self.family.score_head.pooler)(hidden_BD[:, None])
        return cast(Tensor, self.score_head(hidden_BD.float()))

    def _positions(self, inputs: StageInput) -> Tensor:
        """Positions as the model's embeddings count them."""
        pad: int | None = getattr(self.config, "pad_token_id", None)
        if not self.family.positions_after_pad or pad is None:
            return inputs.position_ids
        positions_BT = inputs.position_ids + pad + 1
        mask = inputs.attention_mask
        return positions_BT if mask is None else positions_BT.masked_fill(mask == 0, pad)

    def _mask(self, inputs: StageInput, dtype: torch.dtype) -> Tensor | dict[str, Tensor] | None:
        if inputs.segment_ids is None:
            return inputs.attention_mask
        return make_packed_masks(
            self.config, inputs.segment_ids, inputs.attention_mask, dtype=dtype, attention=self.attention
        )

    def new_cache(self) -> Cache:
        """An empty KV cache for this stage's blocks."""
        return DynamicCache(config=self.model.config) if self.family.halves is None else new_halves_cache()

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
        if inputs.hidden is not None:
            # What comes over a wire lies on the CPU; autograd brings its gradient back there.
            return inputs.hidden.to(self.device)
        assert self.is_first and inputs.input_ids is not None, "the first stage needs token ids, others hidden states"
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
