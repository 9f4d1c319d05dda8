"""A trained head on the last stage that scores sequences, beside whatever a method trains.

Joined over the stages the checkpoint is the one that stock peft writes for ``task_type: SEQ_CLS``: the head is among
its ``modules_to_save`` under transformers' name for it. Of a model that is trained in full it is one more module.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from edge_node.methods.base import AttachedMethod, TrainableParameter
from edge_node.methods.checkpoint import KEY_PREFIX, load_values, parameter_state
from edge_node.methods.registry import METHODS
from edge_node.methods.seeding import seeded_generator
from edge_node.stage.stage import Stage
from plutino.family import ScoreHead
from plutino.job.frozen_blocks import kept_place
from plutino.job.spec import JobSpec
from plutino.key_value_layout import bare_name

SCORE_NAME = f"{KEY_PREFIX}score.weight"
"""Global name of a decoder's head, which is one matrix."""

_INITIAL_STD = 0.02
"""Spread of initial weights where a model's config names none."""


class ScoreLayers(nn.Module):
    """Linear layers with a tanh between each two, in fp32.

    Args:
        head: their names.
        widths: numbers in, between and out.
        device: where they compute.
    """

    def __init__(self, head: ScoreHead, widths: tuple[int, ...], device: torch.device) -> None:
        super().__init__()
        self._layers = [nn.Linear(*sizes, bias=head.has_bias, device=device) for sizes in pairwise(widths)]
        self._names = [".".join(part for part in (head.module, layer) if part) for layer in head.layers]
        for index, layer in enumerate(self._layers):
            self.add_module(str(index), layer)

    def by_key(self) -> dict[str, nn.Parameter]:
        """Parameters by the keys of the checkpoint."""
        return {
            f"{KEY_PREFIX}{name}.{key}": parameter
            for name, layer in zip(self._names, self._layers, strict=True)
            for key, parameter in layer.named_parameters()
        }

    @torch.no_grad()
    def draw(self, *, std: float, seed: int) -> None:
        """Give the matrices values that depend on the seed and their names alone, and the biases 0."""
        for name, parameter in self.by_key().items():
            values = torch.zeros(parameter.shape)
            if parameter.dim() == 2:
                values.normal_(0.0, std, generator=seeded_generator(seed, name))
            parameter.copy_(values)

    def forward(self, hidden_BD: Tensor) -> Tensor:
        """Scores [B, outputs]."""
        for index, layer in enumerate(self._layers):
            hidden_BD = layer(hidden_BD if index == 0 else hidden_BD.tanh())
        return hidden_BD


class WithScoreHead:
    """A method and a score head; see :class:`edge_node.methods.base.AttachedMethod`.

    The head stays on while the method is switched off: the base model has none.
    """

    def __init__(
        self, method: AttachedMethod, module: str, layers: ScoreLayers | None, *, is_whole_model: bool = False
    ) -> None:
        self._method = method
        self._module = module
        own = {} if layers is None else layers.by_key()
        if is_whole_model:
            own = {key.removeprefix(KEY_PREFIX): parameter for key, parameter in own.items()}
        self._own = tuple(TrainableParameter(key, (("head", p),), ("head",)) for key, p in own.items())
        self.parameters: tuple[TrainableParameter, ...] = tuple(
            sorted((*method.parameters, *self._own), key=lambda p: p.name)
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
        return self._method.state() | parameter_state(self._own)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Copy values into the stage's parameters, in place.

        Raises:
            ConfigError: a name of this stage is missing, or a tensor has another shape.
        """
        load_values(
            {p.name: p.uses[0][1] for p in self._own},
            {p.name: [p.name, bare_name(p.name)] for p in self._own},
            state,
            advice="Start from an adapter of the same objective and classes",
        )
        self._method.load(state)

    def peft_config(self) -> dict[str, Any]:
        """Content of adapter_config.json for the whole model, the same on every stage."""
        config = self._method.peft_config()
        saved = config.get("modules_to_save") or []
        return {**config, "task_type": "SEQ_CLS", "modules_to_save": sorted({*saved, self._module})}


def attach_method(stage: Stage, spec: JobSpec) -> AttachedMethod:
    """Put what a job trains on a stage, in place: its method, and its objective's score head if it has one.

    Raises:
        ConfigError: the config names what the model does not have, or the model cannot do what the objective asks.
    """
    stage.family.refuse_method(spec.method.type)
    stage.family.refuse_objective(spec.objective)
    method = METHODS[spec.method.type](stage, spec.method, seed=spec.training.seed)
    if (place := kept_place(spec, stage.num_blocks)) is not None:
        stage.keep_below(place)
    objective, head = spec.objective, stage.family.score_head
    if not objective.has_score_head:
        return method
    assert head is not None, "the family can score sequences"
    layers = put_score_head(stage, objective.num_outputs, spec.training.seed) if stage.is_last else None
    return WithScoreHead(method, head.module, layers, is_whole_model=spec.method.trains_weights)


def put_score_head(stage: Stage, num_outputs: int, seed: int) -> ScoreLayers:
    """Let the last stage score sequences with a new head."""
    assert num_outputs > 0, "the coordinator names the classes before devices start"
    head = stage.family.score_head
    assert head is not None, "the family can score sequences"
    # OPT may project before its head.
    width = int(getattr(stage.config, "word_embed_proj_dim", stage.config.hidden_size))
    layers = ScoreLayers(head, (*[width] * len(head.layers), num_outputs), stage.device)
    layers.draw(std=float(getattr(stage.config, "initializer_range", _INITIAL_STD)), seed=seed)
    stage.score_head = layers
    return layers
