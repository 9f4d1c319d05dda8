"""What LoRA makes of one layer's weight, computed by peft itself on a model of that one layer.

It imports torch and peft; only a process that merges imports it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import peft
import torch
from peft.tuners.tuners_utils import cast_adapter_dtype
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

_ADAPTER = "default"

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Dtypes of weights that can be folded into, by the names that the safetensors format uses."""


@dataclass(frozen=True, slots=True)
class LayerUpdate:
    """LoRA's part of one layer, by the ends of peft's keys."""

    module: str
    """Global name of the layer."""
    tensors: Mapping[str, Tensor]
    """lora_A.weight [R, in], lora_B.weight [out, R] and, with DoRA, lora_magnitude_vector [out]."""


@torch.no_grad()
def fold(weight: Tensor, update: LayerUpdate, config: peft.LoraConfig) -> Tensor:
    """The layer's merged weight, in the dtype and layout of ``weight``: peft's ``merge`` to the bit.

    Args:
        weight: [out, in], or [in, out] where ``config.fan_in_fan_out`` says so; taken over, not copied.
        update: the adapter's part.
        config: the whole adapter's.

    Raises:
        ValueError: the adapter's matrices do not fit the weight.
    """
    one_layer = nn.Module()
    one_layer.add_module("layer", _layer(weight, is_conv1d=bool(config.fan_in_fan_out)))
    rank, alpha = layer_scale(update.module, config)
    local = peft.LoraConfig(
        r=rank,
        lora_alpha=cast(int, alpha),
        target_modules=["layer"],
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        fan_in_fan_out=config.fan_in_fan_out,
        # Not computed with: the values are overwritten below.
        init_lora_weights=False,
    )
    peft.inject_adapter_in_model(local, one_layer, adapter_name=_ADAPTER)
    cast_adapter_dtype(one_layer, _ADAPTER)
    layer: Any = one_layer.get_submodule("layer")
    own = {"lora_A.weight": layer.lora_A[_ADAPTER].weight, "lora_B.weight": layer.lora_B[_ADAPTER].weight}
    if _ADAPTER in layer.lora_magnitude_vector:
        own["lora_magnitude_vector"] = layer.lora_magnitude_vector[_ADAPTER].weight
    shapes = {key: tuple(parameter.shape) for key, parameter in own.items()}
    found = {key: tuple(tensor.shape) for key, tensor in update.tensors.items()}
    if shapes != found:
        raise ValueError(f"the adapter has {found} for {update.module}, the base and adapter_config.json ask {shapes}")
    for key, parameter in own.items():
        parameter.copy_(update.tensors[key])
    layer.merge()
    return cast(Tensor, layer.get_base_layer().weight.detach())


def layer_scale(module: str, config: peft.LoraConfig) -> tuple[int, float]:
    """Rank and alpha of a layer, patterns included."""
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    rank = ranks.get(get_pattern_key(list(ranks), module), config.r)
    return rank, alphas.get(get_pattern_key(list(alphas), module), config.lora_alpha)


def _layer(weight: Tensor, *, is_conv1d: bool) -> nn.Module:
    first, second = weight.shape
    with torch.device("meta"):
        layer: nn.Module = Conv1D(second, first) if is_conv1d else nn.Linear(second, first, bias=False)
    layer.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
    if is_conv1d:
        # On the meta device until here; peft looks at the device of every parameter.
        layer.register_parameter("bias", nn.Parameter(torch.zeros(second, dtype=weight.dtype), requires_grad=False))
    return layer
