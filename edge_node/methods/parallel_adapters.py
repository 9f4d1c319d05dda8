"""Parallel adapters on one stage: PAC's side network (Ouyang et al. 2024, arXiv:2408.10746 sec. 4.1).

The module, its arithmetic and its layout on disk are :mod:`plutino.side_network`'s. Here it gets its first values: each
side block is a pruned copy of the block that it follows, or random numbers; either way the part that reaches the head
starts at zero, so that step 0 is the base model. Pruning by gradients waits for the job's first rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from edge_node.methods.checkpoint import StoredAsTrained, in_blocks
from edge_node.methods.gradient_pruning import GradientPruning
from edge_node.methods.pruning import Axes, Scores, choose_places, magnitudes, pruned_parameters
from edge_node.methods.seeding import seeded_generator
from edge_node.stage.stage import Stage
from partitioner.model_sizes import model_sizes
from plutino.job.method import ParallelAdaptersConfig
from plutino.side_layout import SideLayout, side_layout
from plutino.side_network import SideNetwork, copy_values

_RANDOM_SPREAD = 0.02
"""Standard deviation of weights that are drawn, as transformers draws them."""


class AttachedParallelAdapters(StoredAsTrained):
    """A side network on one stage; see :class:`edge_node.methods.base.AttachedMethod`."""

    def __init__(self, side: SideNetwork | None, layout: SideLayout) -> None:
        own = {} if side is None else side.by_key()
        super().__init__(in_blocks(own), advice="Set reduction and blocks as they were when it was trained")
        self._side = side
        self._layout = layout

    def set_enabled(self, enabled: bool) -> None:
        """Switch between the adapted model and exactly the base model."""
        if self._side is not None:
            self._side.is_enabled = enabled

    def peft_config(self) -> dict[str, Any]:
        """Content of adapter_config.json for the whole model, the same on every stage."""
        return self._layout.model_dump(mode="json")


def attach_parallel_adapters(stage: Stage, config: ParallelAdaptersConfig, *, seed: int) -> AttachedParallelAdapters:
    """Put a side network beside a stage's blocks, in place; below the first block that it follows there is none.

    Args:
        stage: a stage without an adapter.
        config: the method's config, the same for every stage.
        seed: the job's seed; drawn values depend on it and on global names alone.

    Raises:
        ConfigError: the model has no such blocks, or they cannot be narrowed so.
    """
    layout = stage.side_layout = _layout(stage, config)
    own_blocks = [index for index in layout.blocks if stage.start_block <= index < stage.end_block]

    def start(scores: Mapping[int, Scores]) -> None:
        if stage.side is not None:
            copy_values(stage.side, _first_values(stage.side, stage, config, seed, scores))

    if config.prunes_by_gradients and stage.has_backbone:
        stage.gradient_start = GradientPruning(stage, _axes(stage, config), own_blocks, start)
    if stage.end_block <= layout.blocks[0]:
        return AttachedParallelAdapters(None, layout)
    side = SideNetwork(
        layout,
        stage.family.model_type,
        stage.start_block,
        stage.end_block,
        attention=stage.attention,
        device=stage.device,
    )
    copy_values(side, _first_values(side, stage, config, seed, {}))
    stage.put_beside(side)
    return AttachedParallelAdapters(side, layout)


def _layout(stage: Stage, config: ParallelAdaptersConfig) -> SideLayout:
    values = stage.config.to_dict()
    return side_layout(
        values,
        stage.family,
        reduction=config.reduction,
        blocks=config.blocks,
        has_whole_heads=config.heads == "whole",
        sizes=model_sizes(values, stage.family),
        # OPT's smallest models project to a narrower width before the head.
        out_width=int(getattr(stage.config, "word_embed_proj_dim", stage.config.hidden_size)),
    )


def _axes(stage: Stage, config: ParallelAdaptersConfig) -> Axes:
    sizes = model_sizes(stage.config.to_dict(), stage.family)
    num_whole = sizes["kv_heads"] if config.heads == "whole" else 0
    return Axes(hidden=sizes["hidden"], head=sizes["head_dim"], inner=sizes["inner"], num_whole_heads=num_whole)


@torch.no_grad()
def _first_values(
    side: SideNetwork, stage: Stage, config: ParallelAdaptersConfig, seed: int, scores: Mapping[int, Scores]
) -> dict[str, Tensor]:
    """What every parameter starts with, by its key; norms and biases keep what transformers gives new ones.

    ``scores`` say what counts in a block; by the size of its weights where there are none.
    """
    values = {
        key: parameter.detach().clone() if parameter.dim() < 2 else _drawn(key, parameter, seed)
        for key, parameter in side.by_key().items()
    }
    values |= {key: torch.zeros_like(value) for key, value in values.items() if key.startswith("side.up.")}
    values |= {key: torch.zeros_like(value) for key, value in values.items() if _is_border_bias(key)}
    if config.init == "random" or not stage.has_backbone:
        # Without blocks there is nothing to prune: such a stage takes over the values of a training under way.
        return values
    axes = _axes(stage, config)
    tables = _tables(stage)
    for index in side.own_blocks:
        block = stage.model.get_submodule(stage.family.block_name(index, stage.num_encoder_blocks))
        of_block = scores.get(index) or magnitudes(block, stage.family, axes)
        places = choose_places(of_block, axes, config.reduction)
        pruned = pruned_parameters(block, stage.family, axes, places)
        pruned |= tables.get(index >= stage.num_encoder_blocks, {})
        values |= {f"side.blocks.{index}.{name}": value for name, value in pruned.items()}
        # What a side block reads of the backbone are the very places that its weights were kept for.
        selection = nn.functional.one_hot(places["hidden"], axes.hidden).float()
        values[f"side.down.{index}.weight"] = selection
        if side.has_entry and index == side.layout.blocks[0]:
            values["side.entry.weight"] = selection
        if side.has_target_entry and index == side.layout.top_blocks[0]:
            values["side.target_entry.weight"] = selection
    return values


def _tables(stage: Stage) -> dict[bool, dict[str, Tensor]]:
    """Is it the decoder's? -> what all blocks of that half bias their scores by, as tensors of a block."""
    halves = stage.family.halves
    if halves is None or not halves.table:
        return {}
    first_blocks = {False: stage.start_block, True: max(stage.start_block, stage.num_encoder_blocks)}
    return {
        is_decoder: {halves.table: parameters[name].detach().float().cpu()}
        for is_decoder, block in first_blocks.items()
        for parameters in (dict(stage.model.named_parameters()),)
        for name in (f"{stage.family.block_name(block, stage.num_encoder_blocks)}.{halves.table}",)
        if name in parameters
    }


def _is_border_bias(key: str) -> bool:
    return key.endswith(".bias") and key.startswith(("side.down.", "side.entry.", "side.target_entry."))


def _drawn(key: str, parameter: Tensor, seed: int) -> Tensor:
    return _RANDOM_SPREAD * torch.randn(parameter.shape, generator=seeded_generator(seed, key))
