"""Full fine-tuning on one stage: every parameter of its part of the model is trained, in place.

Values are fp32. A stage that computes in fp32 trains its weights themselves; one that computes in bf16 has a master of
each beside it, which takes the gradients and the updates and is rounded to the weight after each (mixed precision of
Micikevicius et al. 2018, arXiv:1710.03740): updates too small for bf16 add up. Embedding and head of a tied model are
one global parameter, held by first and last stage, whose gradients are summed before the vote. The checkpoint is the
model itself under transformers' names; there is no base beside it to switch back to.

T5's tables of position biases are used by all blocks of a half: every block gets a use of its own, so that the sum over
blocks has one order, whatever stages they are on.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from edge_node.methods.base import Role, TrainableParameter, block_role
from edge_node.methods.checkpoint import StoredAsTrained
from edge_node.stage.halves import table_name
from edge_node.stage.stage import Stage
from plutino.bias_tables import bias_by_own_table, put_table
from plutino.errors import ConfigError
from plutino.job.method import FullConfig


class AttachedFull(StoredAsTrained):
    """All of a stage's weights; see :class:`edge_node.methods.base.AttachedMethod`."""

    def __init__(self, parameters: Iterable[TrainableParameter]) -> None:
        super().__init__(parameters, advice="It must be the same model, trained in full")

    def set_enabled(self, enabled: bool) -> None:
        """Nothing to switch.

        Raises:
            ConfigError: the base model is asked for, which training has replaced.
        """
        if not enabled:
            raise ConfigError("method.type: full trains the base model in place; run the base in a job of its own")

    def peft_config(self) -> dict[str, Any]:
        """What takes the place of adapter_config.json, which a whole model does not have."""
        return {"peft_type": "PLUTINO_FULL"}


def attach_full(stage: Stage, config: FullConfig, *, seed: int) -> AttachedFull:
    """Train all that a stage holds, in place. Nothing is drawn at random.

    Args:
        stage: a stage without an adapter, not packed.
        config: the method's config, the same for every stage.
        seed: the job's seed.

    Raises:
        ConfigError: the stage's weights cannot be trained: packed, or experts.
    """
    if not stage.packing.is_plain:
        raise ConfigError(
            f"method.type: full trains whole weights, this stage holds them in {stage.packing.scheme}; set "
            "model.quantization: none, quantize_embedding and quantize_head: keep"
        )
    if stage.family.merged:
        raise ConfigError(
            f"method.type: full cannot write {stage.family.model_type}'s experts back as they are stored; use lora"
        )
    shared = _tied_ends(stage) | _tables(stage)
    masters = _Masters()
    parameters: list[TrainableParameter] = []
    found: dict[str, list[tuple[_Use, nn.Parameter, tuple[nn.Parameter, ...]]]] = {}
    for name, weight in stage.model.named_parameters(remove_duplicate=False):
        weight.requires_grad_(True)
        parameter, copies = (weight, ()) if weight.dtype == torch.float32 else (masters.of(weight), (weight,))
        if name in shared:
            found.setdefault(shared[name].name, []).append((shared[name], parameter, copies))
        else:
            parameters.append(TrainableParameter(name, (("block", parameter),), ("block",), copies))
    for name, uses in found.items():
        all_roles = uses[0][0].all_roles
        uses.sort(key=lambda use: all_roles.index(use[0].role))
        own = tuple((use.role, parameter) for use, parameter, _ in uses)
        # All uses are one storage, here and in the copies: one of these stands for it.
        parameters.append(TrainableParameter(name, own, all_roles, uses[0][2]))
    return AttachedFull(parameters)


class _Use(NamedTuple):
    """What a parameter of a stage is one use of."""

    name: str
    """Global name of the whole parameter."""
    role: Role
    all_roles: tuple[Role, ...]


class _Masters:
    """fp32 parameters in the place of narrower weights, one storage where the weights have one."""

    def __init__(self) -> None:
        self._values: dict[int, Tensor] = {}

    def of(self, weight: nn.Parameter) -> nn.Parameter:
        """The master of a weight, which takes the weight's gradients from now on."""
        if weight.data_ptr() not in self._values:
            self._values[weight.data_ptr()] = weight.detach().float()
        master = nn.Parameter(self._values[weight.data_ptr()])
        weight.register_post_accumulate_grad_hook(functools.partial(_hand_over, master))
        return master


def _hand_over(master: nn.Parameter, weight: Tensor) -> None:
    """Add a weight's gradient to its master's, in fp32; that of a frozen one is dropped."""
    gradient, weight.grad = weight.grad, None
    if gradient is None or not master.requires_grad:
        return
    if master.grad is None:
        master.grad = gradient.float()
    else:
        master.grad.add_(gradient)


def _tied_ends(stage: Stage) -> dict[str, _Use]:
    """The uses of a table that embedding and head share, by their names in the model.

    The head gets a Parameter of its own on the embedding's storage, so that each use keeps its own gradient.

    Raises:
        ConfigError: they are two tables, though the model ties them.
    """
    if not stage.is_tied:
        return {}
    embedding, head = stage.family.embedding[0], stage.family.head
    if stage.is_first and stage.is_last:
        table, own = stage.model.get_parameter(embedding), stage.model.get_parameter(head)
        if own is not table:
            raise ConfigError(
                f"config.json ties {head} to {embedding} but the checkpoint stores another one; set "
                "tie_word_embeddings to false there"
            )
        stage.model.get_submodule(stage.head_name).register_parameter("weight", nn.Parameter(table.data))
    roles: tuple[Role, ...] = ("embedding", "head")
    return {name: _Use(embedding, role, roles) for name, role in zip((embedding, head), roles, strict=True)}


def _tables(stage: Stage) -> dict[str, _Use]:
    """The uses of T5's tables of position biases, by their names in the model: one in each block, on one storage."""
    family, num_encoder_blocks = stage.family, stage.num_encoder_blocks
    if family.halves is None or not family.halves.table:
        return {}
    table, uses = family.halves.table, {}
    weights: dict[str, Tensor] = {}
    for index in range(stage.start_block, stage.end_block):
        own = f"{family.block_name(index, num_encoder_blocks)}.{table}"
        block = stage.model.get_submodule(own.removesuffix(f".{table}"))
        name = table_name(family, index, num_encoder_blocks)
        if name in weights:
            put_table(block, table, weights[name])
        weights.setdefault(name, stage.model.get_parameter(own).data)
        bias_by_own_table(block, table)
        half = (0, num_encoder_blocks) if index < num_encoder_blocks else (num_encoder_blocks, stage.num_blocks)
        uses[own] = _Use(name, block_role(index), tuple(map(block_role, range(*half))))
    return uses
