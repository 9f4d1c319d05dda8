"""LoRA on one stage, through peft: joined over the stages it is the adapter that stock peft trains and saves.

peft replaces the layers and computes. Of our own are initial values, which come from (seed, global name), dropout,
which is seeded by position, and ``modules_to_save``, which is trained in fp32 also on a bf16 base.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any, cast

import peft
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import cast_adapter_dtype
from torch import Tensor, nn

from edge_node.methods.base import Role, TrainableParameter
from edge_node.methods.checkpoint import KEY_PREFIX, load_values
from edge_node.methods.dropout import SeededDropout
from edge_node.methods.lora_config import (
    any_name_matches,
    list_targets,
    list_trained_roles,
    resolve_peft_config,
    saved_peft_config,
)
from edge_node.methods.lora_linear import use_lean_lora
from edge_node.methods.seeding import seeded_generator
from edge_node.methods.trained_copy import TrainedCopy, trainable_copy
from edge_node.quantize.linear import QuantLinear
from edge_node.stage.stage import Stage
from plutino.job.method import LoraConfig

_ADAPTER = "default"
"""peft's name for a model's only adapter; it does not appear in checkpoints."""


class AttachedLora:
    """LoRA on one stage; see :class:`edge_node.methods.base.AttachedMethod`."""

    num_prompt_tokens = 0

    def __init__(
        self,
        layers: Iterable[LoraLayer],
        copies: Mapping[Role, TrainedCopy],
        parameters: Iterable[TrainableParameter],
        role_keys: Mapping[Role, str],
        peft_config: dict[str, Any],
    ) -> None:
        self.parameters: tuple[TrainableParameter, ...] = tuple(sorted(parameters, key=lambda p: p.name))
        self._layers = tuple(layers)
        self._copies = copies
        self._role_keys = role_keys
        self._peft_config = peft_config

    def set_enabled(self, enabled: bool) -> None:
        """Switch between the adapted model and exactly the base model."""
        for layer in self._layers:
            layer.enable_adapters(enabled)
        for trained in self._copies.values():
            trained.is_enabled = enabled

    def state(self) -> dict[str, Tensor]:
        """This stage's part of the checkpoint: fp32 copies by peft's keys."""
        return {
            self._key(parameter, role): use.detach().to(torch.float32, copy=True)
            for parameter in self.parameters
            for role, use in parameter.uses
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Copy values into the stage's parameters, in place; names of other stages are ignored.

        A parameter that embedding and head share is taken from either key.

        Raises:
            ConfigError: a name of this stage is missing, or a tensor has another shape; nothing was changed.
        """
        load_values(
            # Several uses have one storage: the first one stands for all.
            {p.name: p.uses[0][1] for p in self.parameters},
            {p.name: [self._key(p, role) for role in p.all_roles] for p in self.parameters},
            state,
            advice="Set rank, target_modules and modules_to_save as they were when it was trained",
        )

    def peft_config(self) -> dict[str, Any]:
        """Content of adapter_config.json for the whole model, the same on every stage."""
        return copy.deepcopy(self._peft_config)

    def _key(self, parameter: TrainableParameter, role: Role) -> str:
        return parameter.name if role == "block" else self._role_keys[role]


def attach_lora(stage: Stage, config: LoraConfig, *, seed: int) -> AttachedLora:
    """Put LoRA's trainable part on a stage, in place. A stage where nothing is trained is fine.

    Args:
        stage: a stage without an adapter.
        config: the method's config, the same for every stage.
        seed: the job's seed; initial values depend on it and on global names alone.

    Raises:
        ConfigError: the config names modules or blocks that the model does not have.
    """
    peft_config = resolve_peft_config(stage, config)
    roles = list_trained_roles(stage, config)
    present = {name for name, _ in stage.model.named_modules()}
    own_targets = [name for name in list_targets(stage, config, peft_config) if name in present]
    if own_targets:
        _inject(stage.model, peft_config, own_targets)
    layers = {name: cast(LoraLayer, stage.model.get_submodule(name)) for name in own_targets}
    for name, layer in layers.items():
        _initialise(layer, name, config, seed)

    role_keys: dict[Role, str] = {
        "embedding": f"{KEY_PREFIX}{stage.embedding_name}.weight",
        "head": f"{KEY_PREFIX}{stage.head_name}.weight",
    }
    copies = _train_in_full(stage, roles, is_tied=config.ensure_weight_tying)
    parameters = _lora_parameters(layers)
    if copies and config.ensure_weight_tying:
        uses = tuple((role, trained.weight) for role, trained in copies.items())
        parameters.append(TrainableParameter(role_keys["embedding"], uses, roles))
    else:
        parameters += [
            TrainableParameter(role_keys[role], ((role, trained.weight),), (role,)) for role, trained in copies.items()
        ]
    return AttachedLora(layers.values(), copies, parameters, role_keys, saved_peft_config(stage, config, peft_config))


class _SeededDoraVariant(DoraLinearVariant):
    """DoRA that takes its training path while dropout draws masks: peft's goes by training mode."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        module.training = module.lora_dropout[active_adapter].is_active
        return DoraLinearVariant.forward(module, active_adapter, x, result, **kwargs)


def _inject(model: nn.Module, peft_config: peft.LoraConfig, own_targets: list[str]) -> None:
    """Let peft replace this stage's targets, and only them."""
    local = copy.deepcopy(peft_config)
    local.target_modules = own_targets
    if any(isinstance(model.get_submodule(name), QuantLinear) for name in own_targets):
        # A packed Conv1D is held as [out, in] like any other layer; the adapter's own matrices do not differ.
        local.fan_in_fan_out = False
    # peft warns of patterns that match no layer here, though they may match another stage's.
    for setting in ("rank_pattern", "alpha_pattern"):
        patterns: dict[str, Any] = getattr(local, setting)
        used = {key: value for key, value in patterns.items() if any_name_matches(key, own_targets, setting=setting)}
        setattr(local, setting, used)
    peft.inject_adapter_in_model(local, model, adapter_name=_ADAPTER)
    cast_adapter_dtype(model, _ADAPTER)


@torch.no_grad()
def _initialise(layer: Any, name: str, config: LoraConfig, seed: int) -> None:
    """Give an adapted layer peft's kind of initial values, from a generator of its own, and seeded dropout."""
    lora_a, lora_b = layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
    generator = seeded_generator(seed, f"{KEY_PREFIX}{name}.lora_A.weight")
    # On the CPU, whatever device the stage computes on: elsewhere the generator would draw other numbers.
    lora_a.copy_(nn.init.kaiming_uniform_(torch.empty(lora_a.shape), a=5**0.5, generator=generator))
    nn.init.zeros_(lora_b)
    if config.dropout > 0:
        layer.lora_dropout[_ADAPTER] = SeededDropout(config.dropout, name)
    if not config.use_dora:
        use_lean_lora(layer, _ADAPTER)
    else:
        # Once more, with the adapter in fp32: peft rounds the norms of a bf16 weight to bf16, and the adapted model
        # would start up to 0.4 % away from the base model.
        layer.lora_magnitude_vector[_ADAPTER].update_layer(
            base_layer=layer.get_base_layer(), lora_A=lora_a, lora_B=lora_b, scaling=layer.scaling[_ADAPTER]
        )
        if config.dropout > 0:
            layer.lora_variant[_ADAPTER] = _SeededDoraVariant()


def _lora_parameters(layers: Mapping[str, Any]) -> list[TrainableParameter]:
    parameters: list[TrainableParameter] = []
    for name, layer in layers.items():
        own: dict[str, nn.Parameter] = {
            "lora_A.weight": layer.lora_A[_ADAPTER].weight,
            "lora_B.weight": layer.lora_B[_ADAPTER].weight,
        }
        if _ADAPTER in layer.lora_magnitude_vector:
            own["lora_magnitude_vector"] = layer.lora_magnitude_vector[_ADAPTER].weight
        parameters += [
            TrainableParameter(f"{KEY_PREFIX}{name}.{key}", (("block", parameter),), ("block",))
            for key, parameter in own.items()
        ]
    return parameters


def _train_in_full(stage: Stage, roles: Iterable[Role], *, is_tied: bool) -> dict[Role, TrainedCopy]:
    """Put trained copies in place of the stage's own embedding and head, as far as they have these roles."""
    module_names: dict[Role, str] = {}
    if stage.is_first:
        module_names["embedding"] = stage.embedding_name
    if stage.is_last:
        module_names["head"] = stage.head_name
    copies: dict[Role, TrainedCopy] = {}
    for role in roles:
        if role not in module_names:
            continue
        original = stage.model.get_submodule(module_names[role])
        assert isinstance(original, nn.Embedding | nn.Linear)
        # A second Parameter on the first one's storage: one value, two gradients.
        shared = copies["embedding"].weight.data if is_tied and copies else None
        copies[role] = TrainedCopy(
            original, trainable_copy(original.weight) if shared is None else nn.Parameter(shared)
        )
        stage.model.set_submodule(module_names[role], copies[role])
    return copies
