"""Full fine-tuning on one stage: every parameter of its part of the model is trained, in place.

Values are fp32, and so is the computation: a stage's weights are its master weights. Embedding and head of a tied model
are one global parameter, held by first and last stage, whose gradients are summed before the vote. The checkpoint is
the model itself under transformers' names; there is no base beside it to switch back to.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from edge_node.methods.base import Role, TrainableParameter
from edge_node.methods.checkpoint import load_values, parameter_state
from edge_node.stage.stage import Stage
from plutino.errors import ConfigError
from plutino.job.method import FullConfig


class AttachedFull:
    """All of a stage's weights; see :class:`edge_node.methods.base.AttachedMethod`."""

    num_prompt_tokens = 0

    def __init__(self, parameters: Iterable[TrainableParameter]) -> None:
        self.parameters: tuple[TrainableParameter, ...] = tuple(sorted(parameters, key=lambda p: p.name))

    def set_enabled(self, enabled: bool) -> None:
        """Nothing to switch.

        Raises:
            ConfigError: the base model is asked for, which training has replaced.
        """
        if not enabled:
            raise ConfigError("method.type: full trains the base model in place; run the base in a job of its own")

    def state(self) -> dict[str, Tensor]:
        """This stage's part of the model: fp32 copies by transformers' names."""
        return parameter_state(self.parameters)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Copy values into the stage's weights, in place; names of other stages are ignored.

        Raises:
            ConfigError: a name of this stage is missing, or a tensor has another shape; nothing was changed.
        """
        load_values(
            {p.name: p.uses[0][1] for p in self.parameters},
            {p.name: (p.name,) for p in self.parameters},
            state,
            advice="It must be the same model, trained in full",
        )

    def peft_config(self) -> dict[str, Any]:
        """What takes the place of adapter_config.json, which a whole model does not have."""
        return {"peft_type": "PLUTINO_FULL"}


def attach_full(stage: Stage, config: FullConfig, *, seed: int) -> AttachedFull:
    """Train all that a stage holds, in place. Nothing is drawn at random.

    Args:
        stage: a stage without an adapter, in fp32, not packed.
        config: the method's config, the same for every stage.
        seed: the job's seed.

    Raises:
        ConfigError: the stage's weights cannot be trained: packed, in bf16, or experts.
    """
    if not stage.packing.is_plain or stage.dtype != torch.float32:
        raise ConfigError(
            f"method.type: full trains weights in fp32, this stage holds them in {stage.packing.scheme} and computes "
            f"in {str(stage.dtype).removeprefix('torch.')}; set model.dtype: fp32 and model.quantization: none"
        )
    if stage.family.merged:
        raise ConfigError(
            f"method.type: full cannot write {stage.family.model_type}'s experts back as they are stored; use lora"
        )
    embedding, head = stage.family.embedding[0], stage.family.head
    if stage.is_tied and stage.is_first and stage.is_last:
        _part_uses(stage, embedding, head)
    roles: tuple[Role, ...] = ("embedding", "head")
    parameters: list[TrainableParameter] = []
    tied: list[tuple[Role, nn.Parameter]] = []
    for name, parameter in stage.model.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(True)
        if stage.is_tied and name in (embedding, head):
            tied.append(("embedding" if name == embedding else "head", parameter))
        else:
            parameters.append(TrainableParameter(name, (("block", parameter),), ("block",)))
    if tied:
        uses = tuple(sorted(tied, key=lambda use: roles.index(use[0])))
        parameters.append(TrainableParameter(embedding, uses, roles))
    return AttachedFull(parameters)


def _part_uses(stage: Stage, embedding: str, head: str) -> None:
    """Give the head a Parameter of its own on the embedding's storage, so that each use keeps its own gradient."""
    table, own = stage.model.get_parameter(embedding), stage.model.get_parameter(head)
    if own is not table:
        raise ConfigError(
            f"config.json ties {head} to {embedding} but the checkpoint stores another one; set tie_word_embeddings "
            "to false there"
        )
    stage.model.get_submodule(head.rpartition(".")[0]).register_parameter("weight", nn.Parameter(table.data))
