"""The blocks below the lowest one that a method trains: what they give, kept once, and left out from then on.

Such blocks give the same in every epoch. Their output is taken where the lowest trained block gets it, inside a stage
or at its border, and put back there in a pass that leaves them out. The model's own ``forward`` runs in both cases:
what it makes for all blocks (masks, angles) is made as ever, only the blocks in question hand on what they get.

An encoder-decoder's blocks are counted through. Where the lowest trained one is a decoder's, the encoder is left out
whole, and its output is kept beside what that block gets.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from edge_node.stage.passes import StageInput
from edge_node.stage.rounding import rounded_to_bf16
from plutino.bias_tables import lend_table
from plutino.families import Family
from plutino.side_network import BackboneStates


class FrozenPrefix:
    """Of a stage that holds the lowest trained block.

    Args:
        model: the stage's part of the model.
        family: of the model.
        start_block: the stage's first block.
        place: the lowest trained block.
        num_encoder_blocks: of an encoder-decoder; 0 for other models.
    """

    def __init__(self, model: nn.Module, family: Family, start_block: int, place: int, num_encoder_blocks: int) -> None:
        self.is_of_target = place >= num_encoder_blocks > 0
        """Whether the lowest trained block is one of an encoder-decoder's decoder."""
        self._is_of_source = place < num_encoder_blocks
        first = max(start_block, num_encoder_blocks) if self.is_of_target else start_block
        lowest = model.get_submodule(family.block_name(place, num_encoder_blocks))
        blocks, _, _ = family.block_name(place, num_encoder_blocks).rpartition(".")
        self._blocks = model.get_submodule(blocks)
        """Of the half that the lowest trained block belongs to, or of the whole stage."""
        names = [family.block_name(block, num_encoder_blocks) for block in range(first, place)]
        self._below = [name.rpartition(".")[2] for name in names]
        if names and family.halves is not None and family.halves.table:
            lend_table(model.get_submodule(names[0]), lowest, family.halves.table)
        self._states: BackboneStates | None = None
        self._known: Tensor | None = None
        self.is_rounded = False
        """Whether the border at the place carries bf16: what is kept is what such a border hands on."""
        # Before all other hooks of the block: those that round its input see what is put back here.
        lowest.register_forward_pre_hook(self._at_place, prepend=True, with_kwargs=True)

    @contextmanager
    def recording(self) -> Iterator[BackboneStates]:
        """Take what the lowest trained block gets in a pass, as the states' entry, of a decoder's as the target's."""
        self._states = states = BackboneStates()
        try:
            yield states
        finally:
            self._states = None

    @contextmanager
    def left_out(self, inputs: StageInput, states: BackboneStates, device: torch.device) -> Iterator[StageInput]:
        """Run a pass without the blocks below; gives its input.

        Args:
            inputs: what the micro-batch brings.
            states: what :meth:`recording` took of it.
            device: where the stage computes.
        """
        known = states.target_entry if self.is_of_target else states.entry
        assert known is not None, "the lowest trained block reads what lies below"
        self._known = known = known.to(device)
        of_stage = {name: self._blocks.get_submodule(name) for name in self._below}
        try:
            for name, block in of_stage.items():
                self._blocks.add_module(name, _LeftOut(block))
            yield self._from_place(inputs, known, states.source)
        finally:
            self._known = None
            for name, block in of_stage.items():
                self._blocks.add_module(name, block)

    def _from_place(self, inputs: StageInput, known: Tensor, source_BSD: Tensor | None) -> StageInput:
        """The input of a pass that begins at the place; an encoder-decoder's target may still come from below."""
        if self.is_of_target:
            return replace(inputs, input_ids=None, source=source_BSD, hidden=known, has_new_source=False)
        if self._is_of_source:
            return replace(inputs, input_ids=None, source=known)
        return replace(inputs, hidden=known)

    def _at_place(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._states is not None:
            entry = args[0] if args else kwargs["hidden_states"]
            entry = rounded_to_bf16(entry) if self.is_rounded else entry
            if self.is_of_target:
                self._states.target_entry = entry
            else:
                self._states.entry = entry
        if self._known is None:
            return None
        if args:
            return (self._known, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._known}


class _LeftOut(nn.Module):
    """Stands for a block whose output nobody reads: what comes behind it is put back at the place."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        # No submodule, so that nothing of it is found twice.
        object.__setattr__(self, "_block", block)

    def __getattr__(self, name: str) -> Any:
        """What a model's ``forward`` asks of its blocks beside calling them, such as their kind of attention."""
        return getattr(object.__getattribute__(self, "_block"), name)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[None, None, None]:
        """Some models hand on the first part of a block's output, others all of it; none looks at it.

        T5's blocks also give the biases of their scores, which the lowest trained block then makes itself.
        """
        return None, None, None
