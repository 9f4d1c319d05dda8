"""A reward adapter beside the job's own: LoRA and score head of a finished reward job, frozen, switched on to score.

It sits on the frozen layers themselves, so that it needs no place in the job's method: while the method is switched off
its layers are what every input goes through, and each adds this adapter's share to what it gives.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from edge_node.methods.checkpoint import KEY_PREFIX
from edge_node.methods.score_head import SCORE_NAME, ScoreLayers
from edge_node.objectives.base import Loss, NoReference
from edge_node.objectives.sequence_scores import sequence_scores
from edge_node.stage.stage import Stage
from plutino.data.batches import MicroBatchRows
from plutino.errors import ConfigError

_LORA_A = re.compile(rf"{re.escape(KEY_PREFIX)}(.+)\.lora_A\.weight")


class RewardAdapter:
    """On one stage. It is off until it is asked to score.

    Args:
        stage: with the job's method attached, which is switched off while this one scores.
        config_json: the adapter's adapter_config.json.
        state: its tensors by peft's keys, of all stages.

    Raises:
        ConfigError: it is no LoRA adapter with a score head of one output, or not of this model.
    """

    def __init__(self, stage: Stage, config_json: str, state: Mapping[str, Tensor]) -> None:
        config: dict[str, Any] = json.loads(config_json)
        check_reward_adapter(config, state)
        self._shares: list[_Share] = []
        targets = {match[1]: key for key in state if (match := _LORA_A.fullmatch(key))}
        for name, layer in _frozen_layers(stage.model).items():
            if (key := targets.get(name)) is not None:
                b = state[key.replace(".lora_A.", ".lora_B.")]
                share = _Share(state[key].to(stage.device), b.to(stage.device), _scaling(config, name))
                layer.register_forward_hook(share)
                self._shares.append(share)
        if stage.is_last:
            stage.score_head = _score_layers(stage, state)

    def set_enabled(self, enabled: bool) -> None:
        """Let it change what the frozen layers give, or not."""
        for share in self._shares:
            share.is_on = enabled


def check_reward_adapter(config: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Can it score beside another adapter?

    Raises:
        ConfigError: it cannot.
    """
    problems = []
    if config.get("peft_type") != "LORA":
        problems.append(f"its peft_type is {config.get('peft_type')}, which is not LORA")
    if config.get("use_dora"):
        problems.append("it was trained with use_dora")
    score = state.get(SCORE_NAME)
    if score is None or score.shape[0] != 1:
        problems.append("it has no score head of one output")
    others = sorted(set(config.get("modules_to_save") or ()) - {"score"})
    if others:
        problems.append(f"it holds whole modules: {', '.join(others)}")
    if problems:
        raise ConfigError(
            f"the reward adapter cannot be used: {'; '.join(problems)}; train one with objective.type: reward and "
            "method.type: lora"
        )


class RewardScores(NoReference):
    """The reward adapter's part of an objective: each row's value is its reward, and there is no loss."""

    def loss(
        self,
        stage: Stage,
        hidden_BTD: Tensor,
        rows: MicroBatchRows,
        loss_weight: float,
        reference: Tensor | None = None,
    ) -> Loss:
        """See :class:`edge_node.objectives.base.Objective`."""
        return Loss(None, 0.0, sequence_scores(stage, hidden_BTD, rows).detach())


def _score_layers(stage: Stage, state: Mapping[str, Tensor]) -> ScoreLayers:
    head, weight = stage.family.score_head, state[SCORE_NAME]
    width = int(getattr(stage.config, "word_embed_proj_dim", stage.config.hidden_size))
    if head is None or weight.shape[1] != width:
        raise ConfigError(
            f"the reward adapter's score head reads {weight.shape[1]} numbers, the base model gives {width}; train it "
            "on the same base model"
        )
    layers = ScoreLayers(head, (width, 1), stage.device)
    for key, parameter in layers.by_key().items():
        parameter.requires_grad_(False).copy_(state[key])
    return layers


class _Share:
    """What the adapter adds to one layer's output."""

    def __init__(self, a_RK: Tensor, b_NR: Tensor, scaling: float) -> None:
        self.is_on = False
        self._a_RK, self._b_NR, self._scaling = a_RK, b_NR, scaling

    def __call__(self, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if not self.is_on:
            return None
        x = inputs[0]
        reduced = functional.linear(x, self._a_RK.to(x.dtype))
        return output + functional.linear(reduced, self._b_NR.to(x.dtype)) * self._scaling


def _frozen_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Layers by the names that they have without the job's method, which may have put its own around them."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        bare = name.replace(".base_layer", "")
        if bare not in found or name != bare:
            found[bare] = module
    return found


def _scaling(config: Mapping[str, Any], name: str) -> float:
    """Of one layer, with the patterns that peft matches at the end of its name."""

    def of(setting: str, default: float) -> float:
        for pattern, value in (config.get(f"{setting}_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", name):
                return float(value)
        return default

    rank = of("rank", float(config["r"]))
    alpha = of("alpha", float(config["lora_alpha"]))
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank
