"""The blocks below the lowest one that a method trains: what they give, kept once, and left out from then on.

Such blocks give the same in every epoch. Their output is taken where the lowest trained block gets it, inside a stage
or at its border, and put back there in a pass that leaves them out. The model's own ``forward`` runs in both cases:
what it makes for all blocks (masks, angles) is made as ever, only the blocks in question hand on what they get.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from edge_node.stage.rounding import rounded_to_bf16
from plutino.side_network import BackboneStates


class FrozenPrefix:
    """Of a stage that holds the lowest trained block.

    Args:
        blocks: the stage's blocks by their number in the model.
        start_block: the stage's first block.
        place: the lowest trained block.
    """

    def __init__(self, blocks: nn.Module, start_block: int, place: int) -> None:
        self._blocks = blocks
        self._below = [str(block) for block in range(start_block, place)]
        self._states: BackboneStates | None = None
        self._known: Tensor | None = None
        self.is_rounded = False
        """Whether the border at the place carries bf16: what is kept is what such a border hands on."""
        # Before all other hooks of the block: those that round its input see what is put back here.
        blocks.get_submodule(str(place)).register_forward_pre_hook(self._at_place, prepend=True, with_kwargs=True)

    @contextmanager
    def recording(self) -> Iterator[BackboneStates]:
        """Take what the lowest trained block gets in a pass, as the states' entry."""
        self._states = states = BackboneStates()
        try:
            yield states
        finally:
            self._states = None

    @contextmanager
    def left_out(self, known: Tensor) -> Iterator[None]:
        """Run a pass without the blocks below: the lowest trained one gets ``known``, [B, T, D]."""
        of_stage = {name: self._blocks.get_submodule(name) for name in self._below}
        self._known = known
        try:
            for name, block in of_stage.items():
                self._blocks.add_module(name, _LeftOut(block))
            yield
        finally:
            self._known = None
            for name, block in of_stage.items():
                self._blocks.add_module(name, block)

    def _at_place(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._states is not None:
            entry = args[0] if args else kwargs["hidden_states"]
            self._states.entry = rounded_to_bf16(entry) if self.is_rounded else entry
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

    def forward(self, *args: Any, **kwargs: Any) -> tuple[None]:
        """Some models hand on the first part of a block's output, others all of it; neither looks at it."""
        return (None,)
