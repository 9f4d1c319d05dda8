"""A side network beside a frozen model: the module that devices train and that others load.

PAC's parallel adapters (Ouyang et al. 2024, arXiv:2408.10746 sec. 4.1), a gated ladder after Sung et al. 2022
(arXiv:2206.06522). Behind chosen blocks i of the backbone, with outputs b_i [.., D], stand side blocks: the model's own
kind of block with every width divided by k and as many heads. The side state a [.., R], R = D / k, goes from one to the
next and nothing of it ever enters the backbone:

    a      = entry(b_before)                                  before the first side block: what that block gets
    a      = side_block_i(g_i * a + (1 - g_i) * down_i(b_i))  g_i = sigmoid(gate_i / 0.1), one number a block
    output = b_final + up(norm(a))                            what the backbone's head reads

Encoder-decoders have a ladder beside either half (:mod:`plutino.side_halves`), the decoder's with an entry of its own;
T5's side blocks have a table of position biases each. With ``up`` at zero the output is the backbone's. Side blocks
compute in fp32, ``entry`` and ``down`` take their product in the backbone's dtype. On disk (fp32, beside an
adapter_config.json that is :class:`plutino.side_layout.SideLayout`):

    side.entry.weight       [R, D]      side.entry.bias   [R]
    side.down.<i>.weight    [R, D]      side.down.<i>.bias  [R]      side.gate.<i>   [1]
    side.blocks.<i>.<name in a block of the model's class>
    side.norm.<name in the model's final norm>
    side.target_entry.weight, .bias, side.encoder_norm.<name in the encoder's final norm>    of encoder-decoders
    side.up.weight          [out, R]    side.up.bias      [out]

Needs torch and transformers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Cache, DynamicCache

from plutino.families import Family, family_of
from plutino.side_blocks import make_side_blocks
from plutino.side_layout import SideLayout

GATE_TEMPERATURE = 0.1

# Shape suffixes: B rows, T tokens, D hidden size, R side width.


@dataclass(slots=True)
class BackboneStates:
    """What a side network reads of one pass of the backbone."""

    entry: Tensor | None = None
    """[B, T, D], what the first chosen block got; None where that block is elsewhere. Of an encoder-decoder, which has
    a second entry, its encoder's."""
    target_entry: Tensor | None = None
    """[B, T, D], what the first chosen block of an encoder-decoder's decoder got."""
    source: Tensor | None = None
    """[B, S, D], an encoder's output behind its final norm; read by decoder blocks that are trained themselves."""
    outputs: dict[int, Tensor] = field(default_factory=dict)
    """Chosen block -> its output [B, T, D]."""
    final: Tensor | None = None
    """[B, T, out], behind the final norm; on the last stage."""


class SideNetwork(nn.Module):
    """The side blocks that follow blocks ``[start_block, end_block)`` of a model.

    Args:
        layout: the whole side network.
        model_type: the backbone's family.
        start_block: the backbone's first block here.
        end_block: one past its last block here.
        attention: transformers' attention backend.
        device: where it computes.
    """

    def __init__(
        self, layout: SideLayout, model_type: str, start_block: int, end_block: int, *, attention: str, device: Any
    ) -> None:
        super().__init__()
        self.layout = layout
        self.is_enabled = True
        family = family_of(model_type)
        self.own_blocks = layout.own_blocks(start_block, end_block)
        """Blocks of the backbone here that a side block follows."""
        self.reads_source = layout.blocks[0] < start_block and layout.num_encoder_blocks > 0
        """Whether the side state of an encoder-decoder's source comes from below."""
        self.reads_side = layout.top_blocks[0] < start_block
        """Whether a side state comes from below; of an encoder-decoder, the target's."""
        self.has_entry = layout.blocks[0] in self.own_blocks
        """Whether the side state starts here; of an encoder-decoder, the source's."""
        self.has_target_entry = layout.num_encoder_blocks > 0 and layout.top_blocks[0] in self.own_blocks
        """Whether the side state of an encoder-decoder's target starts here."""
        self.is_last = end_block == layout.num_blocks
        self.num_cached_blocks = end_block - max(start_block, layout.num_encoder_blocks)
        """Blocks of the backbone here that have a layer in a KV cache."""
        width, side_width = layout.width, layout.side_width
        made = make_side_blocks(layout, family, self.own_blocks, attention)
        self.blocks = nn.ModuleDict(
            {str(index): block for index, block in zip(self.own_blocks, made.blocks, strict=True)}
        )
        self.down = nn.ModuleDict({str(index): nn.Linear(width, side_width) for index in self.own_blocks})
        self.gate = nn.ParameterDict({str(index): nn.Parameter(torch.zeros(1)) for index in self.own_blocks})
        self.entry = nn.Linear(width, side_width) if self.has_entry else None
        self.target_entry = nn.Linear(width, side_width) if self.has_target_entry else None
        ends_encoder = start_block < layout.num_encoder_blocks <= end_block
        self.encoder_norm: nn.Module | None = made.encoder_norm if ends_encoder else None
        self.norm: nn.Module | None = made.norm if self.is_last else None
        self.up = nn.Linear(side_width, layout.out_width) if self.is_last else None
        if self.up is not None:
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)
        # The models around the blocks make masks and rotary angles; a second owner of the blocks would name them twice.
        object.__setattr__(self, "_stacks", tuple(stack.to(device).eval() for stack in made.stacks))
        object.__setattr__(self, "_states", BackboneStates())
        for index, block in self.blocks.items():
            block.register_forward_pre_hook(self._rung(index), with_kwargs=True)
        self.to(device)
        self.eval()

    @property
    def stacks(self) -> tuple[Any, ...]:
        """The model around the blocks; of an encoder-decoder its encoder and its decoder."""
        return cast(tuple[Any, ...], cast(Any, self)._stacks)

    @contextmanager
    def reading(self, states: BackboneStates) -> Iterator[None]:
        """Let side blocks that run meanwhile read what the backbone's blocks gave."""
        object.__setattr__(self, "_states", states)
        try:
            yield
        finally:
            object.__setattr__(self, "_states", BackboneStates())

    def by_key(self) -> dict[str, nn.Parameter]:
        """Parameters by the keys of the checkpoint."""
        return {f"side.{name}": parameter for name, parameter in self.named_parameters()}

    def forward(
        self,
        states: BackboneStates,
        side_BTR: Tensor | None,
        *,
        attention_mask: Any,
        position_ids: Tensor | None,
        cache: Cache | None = None,
    ) -> Tensor:
        """The side state behind the last of these blocks, [B, T, R] in fp32.

        Args:
            states: what the backbone's blocks gave.
            side_BTR: the side state from below; None where it starts here.
            attention_mask: as the backbone got it, additive ones in fp32.
            position_ids: as the backbone got them.
            cache: the backbone's KV cache after this pass; the side blocks' layers stand behind its own.
        """
        if self.entry is not None:
            assert states.entry is not None, "the first chosen block is here"
            side_BTR = product(states.entry, self.entry)
        assert side_BTR is not None, "the side state comes from below"
        if not self.own_blocks:
            return side_BTR
        with self.reading(states):
            output = self.stacks[0](
                inputs_embeds=side_BTR,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=None if cache is None else self._layers_behind(cache),
                use_cache=cache is not None,
            )
        return cast(Tensor, output.last_hidden_state)

    def mix(self, hidden: Tensor, side: Tensor) -> Tensor:
        """What the head reads: the backbone's final hidden states [..., out] with the side state's part."""
        assert self.norm is not None and self.up is not None, "only the last stage has them"
        return hidden + cast(Tensor, self.up(self.norm(side))).to(hidden.dtype)

    def _rung(self, index: str) -> Any:
        def mix_in(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            side = args[0] if args else kwargs["hidden_states"]
            below = product(cast(Any, self)._states.outputs[int(index)], cast(nn.Linear, self.down[index]))
            share = torch.sigmoid(self.gate[index] / GATE_TEMPERATURE)
            mixed = share * side + (1 - share) * below
            if args:
                return (mixed, *args[1:]), kwargs
            return args, kwargs | {"hidden_states": mixed}

        return mix_in

    def _layers_behind(self, cache: Cache) -> Cache:
        """The side blocks' part of a KV cache, as a cache: what reorders or crops the whole moves them too."""
        if len(cache.layers) <= self.num_cached_blocks:
            cache.layers.extend(DynamicCache(config=self.stacks[0].config).layers)
        part = DynamicCache()
        part.layers = cache.layers[self.num_cached_blocks :]
        # Layers are there already; a cache that makes its own would make them anew.
        part.layer_class_to_replicate = None
        return part


class BackboneTap:
    """Records what a side network reads, while asked to; the hooks stay on the blocks."""

    def __init__(self, model: nn.Module, family: Family, side: SideNetwork) -> None:
        self._states: BackboneStates | None = None
        layout = side.layout
        for index in side.own_blocks:
            block = model.get_submodule(family.block_name(index, layout.num_encoder_blocks))
            block.register_forward_hook(self._output_hook(index))
            if side.has_entry and index == layout.blocks[0]:
                block.register_forward_pre_hook(self._entry_hook("entry"), with_kwargs=True)
            if side.has_target_entry and index == layout.top_blocks[0]:
                block.register_forward_pre_hook(self._entry_hook("target_entry"), with_kwargs=True)

    @contextmanager
    def recording(self) -> Iterator[BackboneStates]:
        """Record one pass."""
        self._states = states = BackboneStates()
        try:
            yield states
        finally:
            self._states = None

    def _entry_hook(self, entry: str) -> Any:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._states is not None:
                setattr(self._states, entry, args[0] if args else kwargs["hidden_states"])

        return record

    def _output_hook(self, index: int) -> Any:
        def record(module: nn.Module, args: Any, output: Any) -> None:
            if self._states is not None:
                self._states.outputs[index] = output[0] if isinstance(output, tuple) else output

        return record


def side_shapes(layout: SideLayout, model_type: str) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint with its shape."""
    side = SideNetwork(layout, model_type, 0, layout.num_blocks, attention="eager", device="cpu")
    return {name: tuple(parameter.shape) for name, parameter in side.by_key().items()}


def copy_values(side: SideNetwork, values: Mapping[str, Tensor]) -> None:
    """Fill a side network from a checkpoint's tensors."""
    with torch.no_grad():
        for key, parameter in side.by_key().items():
            parameter.copy_(values[key])


def product(hidden: Tensor, linear: nn.Linear) -> Tensor:
    """[..., D] to fp32 [..., R], multiplied in the backbone's dtype."""
    return functional.linear(hidden, linear.weight.to(hidden.dtype), linear.bias.to(hidden.dtype)).float()
