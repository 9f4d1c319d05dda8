"""Full fine-tuning on one stage: every parameter of its part of the model is trained, in place.

Values are fp32. A stage that computes in fp32 trains its weights themselves; one that computes in bf16 has a master of
each beside it, which takes the gradients and the updates and is rounded to the weight after each (mixed precision of
Micikevicius et al. 2018, arXiv:1710.03740): updates too small for bf16 add up. Embedding and head of a tied model are
one global parameter, held by first and last stage, whose gradients are summed before the vote. The checkpoint is the
model itself under transformers' names; there is no base beside it to switch back to.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from edge_node.methods.base import Role, TrainableParameter
from edge_node.methods.checkpoint import StoredAsTrained
from edge_node.stage.stage import Stage
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
    embedding, head = stage.family.embedding[0], stage.family.head
    if stage.is_tied and stage.is_first and stage.is_last:
        _part_uses(stage, embedding, head)
    roles: tuple[Role, ...] = ("embedding", "head")
    masters = _Masters()
    parameters: list[TrainableParameter] = []
    tied: list[tuple[Role, nn.Parameter, tuple[nn.Parameter, ...]]] = []
    for name, weight in stage.model.named_parameters(remove_duplicate=False):
        weight.requires_grad_(True)
        parameter, copies = (weight, ()) if weight.dtype == torch.float32 else (masters.of(weight), (weight,))
        if stage.is_tied and name in (embedding, head):
            tied.append(("embedding" if name == embedding else "head", parameter, copies))
        else:
            parameters.append(TrainableParameter(name, (("block", parameter),), ("block",), copies))
    if tied:
        tied.sort(key=lambda use: roles.index(use[0]))
        uses = tuple((role, parameter) for role, parameter, _ in tied)
        # Both uses are one storage, here and in the copies: one of these stands for it.
        parameters.append(TrainableParameter(embedding, uses, roles, tied[0][2]))
    return AttachedFull(parameters)


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


def _part_uses(stage: Stage, embedding: str, head: str) -> None:
    """Give the head a Parameter of its own on the embedding's storage, so that each use keeps its own gradient."""
    table, own = stage.model.get_parameter(embedding), stage.model.get_parameter(head)
    if own is not table:
        raise ConfigError(
            f"config.json ties {head} to {embedding} but the checkpoint stores another one; set tie_word_embeddings "
            "to false there"
        )
    stage.model.get_submodule(head.rpartition(".")[0]).register_parameter("weight", nn.Parameter(table.data))
