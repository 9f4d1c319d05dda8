"""Prefix tuning on one stage (Li and Liang 2021, arXiv:2101.00190): trained keys and values before every row's own.

Without ``projection`` the keys and values of each block are trained themselves. With it they come out of an MLP, as in
the paper: ``W_block tanh(W E + b) + b_block`` for trained embeddings E. E, W and b serve all blocks: every stage holds
them, and every block's use of them has a gradient of its own, summed in the order of the blocks. The checkpoint is what
stock peft writes, keys and values alone: the MLP is no part of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from edge_node.methods.base import Role, TrainableParameter, block_role
from edge_node.methods.key_values import AttachedKeyValues, KeyValueShape, saved_config, shape_in
from edge_node.methods.seeding import seeded_generator
from edge_node.stage.stage import Stage
from plutino.job.method import PrefixConfig
from plutino.key_value_layout import block_name

_EMBEDDING, _TRUNK = "prefix.embedding.weight", "prefix.transform.0"
"""Names after those of peft's PrefixEncoder."""


def attach_prefix(stage: Stage, config: PrefixConfig, *, seed: int) -> AttachedKeyValues:
    """Put a prefix before the rows of a stage's blocks.

    Args:
        stage: a stage without an adapter.
        config: the method's config, the same for every stage.
        seed: the job's seed; initial values depend on it and on global names alone.
    """
    shape = shape_in(stage, config.num_virtual_tokens)
    blocks = range(stage.start_block, stage.end_block)
    if not config.projection:
        tables = {block: key_value_table(shape, block, seed, init=config.init, device=stage.device) for block in blocks}
        return AttachedKeyValues(
            stage,
            shape,
            {block: lambda table=table: table for block, table in tables.items()},  # type: ignore[misc]
            [TrainableParameter(block_name(block), (("block", table),), ("block",)) for block, table in tables.items()],
            saved_config(stage, shape, encoder_hidden_size=None),
        )
    encoders, parameters = _encoders(stage, shape, config, seed)
    return AttachedKeyValues(
        stage, shape, encoders, parameters, saved_config(stage, shape, encoder_hidden_size=config.encoder_hidden_size)
    )


def key_value_table(shape: KeyValueShape, block: int, seed: int, *, init: str, device: torch.device) -> nn.Parameter:
    """Trained keys and values [P, 2 W] of one block, standard normal or zero at first, as peft has them."""
    size = (shape.num_tokens, 2 * shape.width)
    if init == "zero":
        return nn.Parameter(torch.zeros(size, device=device))
    return nn.Parameter(torch.randn(size, generator=seeded_generator(seed, block_name(block))).to(device))


def _encoders(
    stage: Stage, shape: KeyValueShape, config: PrefixConfig, seed: int
) -> tuple[dict[int, Callable[[], Tensor]], list[TrainableParameter]]:
    width, hidden, device = shape.width, config.encoder_hidden_size, stage.device
    embedding = torch.randn(shape.num_tokens, width, generator=seeded_generator(seed, _EMBEDDING)).to(device)
    trunk, trunk_bias = _linear(hidden, width, _TRUNK, seed, device)
    shared = {_EMBEDDING: embedding, f"{_TRUNK}.weight": trunk, f"{_TRUNK}.bias": trunk_bias}
    uses: dict[str, list[tuple[Role, nn.Parameter]]] = {name: [] for name in shared}
    encoders: dict[int, Callable[[], Tensor]] = {}
    parameters: list[TrainableParameter] = []
    for block in range(stage.start_block, stage.end_block):
        # One storage, and a Parameter a block: each block's gradient is kept apart.
        own = {name: nn.Parameter(value) for name, value in shared.items()}
        for name, parameter in own.items():
            uses[name].append((block_role(block), parameter))
        name = f"prefix.transform.2.{block}"
        weight, bias = map(nn.Parameter, _linear(2 * width, hidden, name, seed, device))
        if config.init == "zero":
            for parameter in (weight, bias):
                nn.init.zeros_(parameter)
        parameters += [
            TrainableParameter(f"{name}.{key}", (("block", parameter),), ("block",))
            for key, parameter in (("weight", weight), ("bias", bias))
        ]
        encoders[block] = _Encoder(*own.values(), weight, bias)
    all_roles = tuple(block_role(block) for block in range(stage.num_blocks))
    parameters += [TrainableParameter(name, tuple(own_uses), all_roles) for name, own_uses in uses.items()]
    return encoders, parameters


class _Encoder:
    """Keys and values [P, 2 W] of one block from the shared embeddings."""

    def __init__(self, *weights: Tensor) -> None:
        self._weights = weights

    def __call__(self) -> Tensor:
        embedding, trunk, trunk_bias, weight, bias = self._weights
        return functional.linear(torch.tanh(functional.linear(embedding, trunk, trunk_bias)), weight, bias)


def _linear(out_size: int, in_size: int, name: str, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Weight and bias of torch's usual initial distribution, from generators of their own."""
    bound = 1 / math.sqrt(in_size)

    def drawn(key: str, *size: int) -> Tensor:
        generator = seeded_generator(seed, f"{name}.{key}")
        return ((2 * torch.rand(size, generator=generator) - 1) * bound).to(device)

    return drawn("weight", out_size, in_size), drawn("bias", out_size)
