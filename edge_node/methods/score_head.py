"""A trained linear head on the last stage, beside whatever a method trains.

Joined over the stages the checkpoint is the one that stock peft writes for ``task_type: SEQ_CLS``: the head is among
its ``modules_to_save`` under transformers' name for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from edge_node.methods.base import AttachedMethod, TrainableParameter
from edge_node.methods.checkpoint import KEY_PREFIX, load_values
from edge_node.methods.registry import METHODS
from edge_node.methods.seeding import seeded_generator
from edge_node.stage.stage import Stage
from plutino.errors import ConfigError
from plutino.job.spec import JobSpec

SCORE_NAME = f"{KEY_PREFIX}score.weight"
"""Global name of the head's weight."""

_INITIAL_STD = 0.02
"""Spread of initial weights where a model's config names none."""


class WithScoreHead:
    """A method and a score head; see :class:`edge_node.methods.base.AttachedMethod`.

    The head stays on while the method is switched off: the base model has none.
    """

    def __init__(self, method: AttachedMethod, weight: nn.Parameter | None) -> None:
        self._method = method
        self._weight = weight
        own = () if weight is None else (TrainableParameter(SCORE_NAME, (("head", weight),), ("head",)),)
        self.parameters: tuple[TrainableParameter, ...] = tuple(
            sorted((*method.parameters, *own), key=lambda p: p.name)
        )

    @property
    def num_prompt_tokens(self) -> int:
        """See :class:`edge_node.methods.base.AttachedMethod`."""
        return self._method.num_prompt_tokens

    def set_enabled(self, enabled: bool) -> None:
        """Switch the method between the adapted model and exactly the base model."""
        self._method.set_enabled(enabled)

    def state(self) -> dict[str, Tensor]:
        """This stage's part of the checkpoint: fp32 copies by peft's keys."""
        state = self._method.state()
        if self._weight is not None:
            state[SCORE_NAME] = self._weight.detach().to(torch.float32, copy=True)
        return state

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Copy values into the stage's parameters, in place.

        Raises:
            ConfigError: a name of this stage is missing, or a tensor has another shape.
        """
        if self._weight is not None:
            load_values(
                {SCORE_NAME: self._weight},
                {SCORE_NAME: [SCORE_NAME]},
                state,
                advice="Start from an adapter of the same objective and classes",
            )
        self._method.load(state)

    def peft_config(self) -> dict[str, Any]:
        """Content of adapter_config.json for the whole model, the same on every stage."""
        config = self._method.peft_config()
        saved = config.get("modules_to_save") or []
        return {**config, "task_type": "SEQ_CLS", "modules_to_save": sorted({*saved, "score"})}


def attach_method(stage: Stage, spec: JobSpec) -> AttachedMethod:
    """Put what a job trains on a stage, in place: its method, and its objective's score head if it has one.

    Raises:
        ConfigError: the config names what the model does not have.
    """
    method = METHODS[spec.method.type](stage, spec.method, seed=spec.training.seed)
    if not spec.objective.has_score_head:
        return method
    if not stage.family.has_score_class:
        raise ConfigError(
            f"transformers has no sequence classification for {stage.family.model_type}, so nobody could load the "
            "result; choose another base model"
        )
    weight = _score_weight(stage, spec.objective.num_outputs, spec.training.seed) if stage.is_last else None
    stage.score_weight = weight
    return WithScoreHead(method, weight)


def _score_weight(stage: Stage, num_outputs: int, seed: int) -> nn.Parameter:
    assert num_outputs > 0, "the coordinator names the classes before devices start"
    # OPT may project before its head.
    width = int(getattr(stage.config, "word_embed_proj_dim", stage.config.hidden_size))
    values = torch.empty(num_outputs, width)
    std = float(getattr(stage.config, "initializer_range", _INITIAL_STD))
    values.normal_(0.0, std, generator=seeded_generator(seed, SCORE_NAME))
    return nn.Parameter(values.to(stage.device))
