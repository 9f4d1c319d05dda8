"""Importance of a block's places by its weights' gradients: the diagonal of the empirical Fisher information.

As Ladder Side-Tuning starts its side network (Sung et al. 2022, arXiv:2206.06522 sec. 3.3; Sung et al. 2021,
arXiv:2111.09839): a weight counts as much as the square of its gradient on the job's own loss, added up over a few
micro-batches. Of each matrix the whole gradient lives for one product; what is kept are the sums of its rows and
columns. A packed weight counts as it is dequantised: it is what the loss is a function of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from edge_node.methods.pruning import Axes, Scores, add_sums, block_linears, no_scores
from edge_node.stage.stage import Stage
from plutino.errors import ModelError, NumericsError

MOST_MICRO_BATCHES = 16
"""Micro-batches of the job's first step whose gradients are squared, at most."""


class GradientPruning:
    """First values of a side network, from gradients that the pipeline sends through the frozen blocks once.

    Args:
        stage: with the blocks.
        axes: sizes of what is pruned.
        blocks: those of the stage's own that are followed; none on a stage below all of them.
        start: gives the side network its first values from the blocks' scores.
    """

    def __init__(
        self, stage: Stage, axes: Axes, blocks: Sequence[int], start: Callable[[Mapping[int, Scores]], None]
    ) -> None:
        self._stage = stage
        self._axes = axes
        self._blocks = tuple(blocks)
        self._start = start
        self._scores: dict[int, Scores] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Passes through the blocks within give gradients, whose squares are added up."""
        stage, handles = self._stage, list[RemovableHandle]()
        self._scores = {index: no_scores(self._axes) for index in self._blocks}
        try:
            for index in self._blocks:
                block = stage.model.get_submodule(stage.family.block_name(index, stage.num_encoder_blocks))
                handles.append(block.register_forward_pre_hook(_want_gradient, with_kwargs=True))
                for name, linear in block_linears(block, stage.family).items():
                    handles.append(linear.register_forward_hook(partial(self._on_product, index, name)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def finish(self) -> None:
        """Give the side network its first values.

        Raises:
            NumericsError: a gradient was not finite.
        """
        for index, scores in self._scores.items():
            if not all(bool(torch.isfinite(of_kind).all()) for of_kind in scores.values()):
                raise NumericsError(
                    f"the gradients of block {index} on the first rows are not finite, so that nothing can be "
                    "pruned by them; set method.init: pruning, or model.dtype: fp32"
                )
        self._start(self._scores)
        self._scores = {}

    def _on_product(self, index: int, name: str, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:
            x = inputs[0].detach()
            output.register_hook(partial(self._take, index, name, x, x._version))

    @torch.no_grad()
    def _take(self, index: int, name: str, x: Tensor, version: int, gradient: Tensor) -> None:
        if x._version != version:
            raise ModelError(f"{name} of block {index}: the model writes over what it multiplied; set init: pruning")
        rows, gradients = x.reshape(-1, x.shape[-1]).float(), gradient.reshape(-1, gradient.shape[-1]).float()
        squares = (gradients.T @ rows).square_()
        add_sums(self._scores[index], squares, self._stage.family, name, self._axes)


def _want_gradient(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    """Let gradients come to a block's own weights also where nothing below wants one."""
    hidden = args[0] if args else kwargs["hidden_states"]
    if hidden.requires_grad or not torch.is_grad_enabled():
        return None
    hidden = hidden.detach().requires_grad_()
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})
