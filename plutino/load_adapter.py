"""Bottleneck adapters: their layout on disk, their arithmetic, and :func:`load_adapter` for whoever uses one.

:func:`load_adapter` loads side networks too, see :mod:`plutino.side_network`. peft has no such adapters. The layout of
bottleneck adapters follows its habits: ``adapter_config.json`` names the adapted layers in full
(:class:`BottleneckLayout`), ``adapter_model.safetensors`` holds, in fp32, for each of them

    base_model.model.<layer>.adapter_down.weight  [bottleneck, width]     .bias  [bottleneck]
    base_model.model.<layer>.adapter_up.weight    [width, bottleneck]     .bias  [width]

with the modules of the model that were trained beside them (``modules_to_save``: a score head) under their own names,
and a layer's output y becomes ``y + up(activation(down(y)))`` (Houlsby et al. 2019, arXiv:1902.00751). Needs torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from plutino.errors import ConfigError
from plutino.saved_modules import KEY_PREFIX, load_saved_modules, saved_shapes
from plutino.side_layout import SIDE_TYPE

if TYPE_CHECKING:
    from plutino.side_loader import LoadedSideNetwork

ADAPTER_TYPE = "PLUTINO_BOTTLENECK"
"""What stands in adapter_config.json where peft's adapters name their ``peft_type``."""
_DOWN, _UP = "adapter_down", "adapter_up"

_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "tanh": torch.tanh,
}


class BottleneckLayout(BaseModel):
    """Content of adapter_config.json."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    peft_type: Literal["PLUTINO_BOTTLENECK"] = "PLUTINO_BOTTLENECK"
    task_type: Literal["CAUSAL_LM", "SEQ_CLS", "SEQ_2_SEQ_LM"] = "CAUSAL_LM"
    base_model_name_or_path: str | None = None
    modules_to_save: tuple[str, ...] = ()
    """Modules of the base model that were trained whole beside the adapters: a score head."""
    placement: Literal["houlsby", "pfeiffer"]
    bottleneck: int
    activation: Literal["relu", "gelu", "silu", "tanh"]
    width: int
    """Width of the adapted layers' outputs: the model's hidden size."""
    layers: tuple[str, ...]
    """Global names of the adapted layers, in the model's order."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the adapters with its shape."""
        sizes = {
            f"{_DOWN}.weight": (self.bottleneck, self.width),
            f"{_DOWN}.bias": (self.bottleneck,),
            f"{_UP}.weight": (self.width, self.bottleneck),
            f"{_UP}.bias": (self.width,),
        }
        return {f"{KEY_PREFIX}{layer}.{key}": shape for layer in self.layers for key, shape in sizes.items()}

    def check_model(self, model: nn.Module) -> None:
        """See whether a model has the adapted layers.

        Raises:
            ConfigError: it lacks some.
        """
        modules = dict(model.named_modules())
        missing = [layer for layer in self.layers if layer not in modules]
        if missing:
            raise ConfigError(
                f"the model lacks {len(missing)} of the {len(self.layers)} layers that the adapter belongs to, first "
                f"{missing[0]}; load the base model that it was trained on: {self.base_model_name_or_path}"
            )


class Bottleneck(nn.Module):
    """One adapter; parameters in fp32, products in the dtype of what it gets.

    It starts as the identity: up is zero, down is drawn as :class:`torch.nn.Linear` draws.

    Args:
        width: width D of what it reads and writes.
        bottleneck: inner dimension.
        activation: relu, gelu, silu or tanh.
        device: where its parameters lie.
        generator: draws down's weight, on the CPU.
    """

    def __init__(
        self, width: int, bottleneck: int, activation: str, *, device: torch.device, generator: torch.Generator | None
    ) -> None:
        super().__init__()
        self.is_enabled = True
        self._activation = _ACTIVATIONS[activation]
        down = nn.init.kaiming_uniform_(torch.empty(bottleneck, width), a=5**0.5, generator=generator)
        self.down = nn.Parameter(down.to(device))
        self.down_bias = nn.Parameter(torch.zeros(bottleneck, device=device))
        self.up = nn.Parameter(torch.zeros(width, bottleneck, device=device))
        self.up_bias = nn.Parameter(torch.zeros(width, device=device))

    def forward(self, y: Tensor) -> Tensor:
        """What becomes of a layer's output [..., D]."""
        if not self.is_enabled:
            return y
        inner = functional.linear(y, self.down.to(y.dtype), self.down_bias.to(y.dtype))
        return y + functional.linear(self._activation(inner), self.up.to(y.dtype), self.up_bias.to(y.dtype))

    def by_key(self, layer: str) -> dict[str, nn.Parameter]:
        """Parameters by the keys of the checkpoint."""
        own = {
            f"{_DOWN}.weight": self.down,
            f"{_DOWN}.bias": self.down_bias,
            f"{_UP}.weight": self.up,
            f"{_UP}.bias": self.up_bias,
        }
        return {f"{KEY_PREFIX}{layer}.{key}": parameter for key, parameter in own.items()}


def insert_bottleneck(layer: nn.Module, bottleneck: Bottleneck) -> None:
    """Let a layer's output pass through an adapter; no name of the model changes."""

    def adapt(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return cast(Tensor, bottleneck(output))

    layer.register_forward_hook(adapt)


class LoadedAdapter:
    """The adapters in a model, as :func:`load_adapter` put them there."""

    def __init__(self, layout: BottleneckLayout, bottlenecks: Mapping[str, Bottleneck]) -> None:
        self.layout = layout
        self.bottlenecks = bottlenecks
        """By the global name of the adapted layer."""

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Exactly the base model, for a while."""
        for bottleneck in self.bottlenecks.values():
            bottleneck.is_enabled = False
        try:
            yield
        finally:
            for bottleneck in self.bottlenecks.values():
                bottleneck.is_enabled = True


def has_own_layout(folder: Path) -> bool:
    """Whether a folder holds an adapter that :func:`load_adapter` loads rather than one of peft's."""
    return _type_in(folder) in (ADAPTER_TYPE, SIDE_TYPE)


def _type_in(folder: Path) -> object:
    try:
        return json.loads((folder / "adapter_config.json").read_bytes()).get("peft_type")
    except OSError as error:
        raise ConfigError(f"cannot read {folder / 'adapter_config.json'}: {error.strerror}") from error


def expected_shapes(model: nn.Module, folder: Path) -> dict[str, tuple[int, ...]]:
    """Every tensor that an adapter's folder must hold, with its shape; the model needs no weights.

    Raises:
        ConfigError: the folder holds something else, or the adapter belongs to another model.
    """
    if _type_in(folder) == SIDE_TYPE:
        from plutino.side_loader import expected_side_shapes

        return expected_side_shapes(model, folder)
    layout = read_layout(folder)
    layout.check_model(model)
    return layout.shapes() | saved_shapes(model, layout.modules_to_save)


def read_layout(folder: Path) -> BottleneckLayout:
    """The layout that an adapter's folder describes.

    Raises:
        ConfigError: the folder is none of this layout.
    """
    try:
        return BottleneckLayout.model_validate_json((folder / "adapter_config.json").read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read {folder / 'adapter_config.json'}: {error.strerror}") from error
    except ValidationError as error:
        raise ConfigError(
            f"{folder} holds no bottleneck adapter of plutino: {error.error_count()} of its settings do not fit; "
            "adapters of other methods are loaded with peft"
        ) from error


def load_adapter(model: nn.Module, folder: str | Path) -> LoadedAdapter | LoadedSideNetwork:
    """Put a published bottleneck adapter on its base model, or a side network beside it, in place.

    Args:
        model: the base model, as transformers loads it; in any dtype, on one device. Of the class for sequence
            classification, with as many labels, where a score head was trained: it gets the trained one.
        folder: holds adapter_config.json and adapter_model.safetensors.

    Raises:
        ConfigError: the folder holds something else, or the model lacks a layer that it adapts or its score head.
    """
    folder = Path(folder)
    if _type_in(folder) == SIDE_TYPE:
        # Heavy: transformers is needed for side networks alone.
        from plutino.side_loader import load_side_network

        return load_side_network(model, folder)
    layout = read_layout(folder)
    layout.check_model(model)
    modules = dict(model.named_modules())
    tensors = load_file(folder / "adapter_model.safetensors")
    saved = saved_shapes(model, layout.modules_to_save)
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items() if name not in saved}
    if found != layout.shapes():
        wrong = sorted(set(found.items()) ^ set(layout.shapes().items()))
        raise ConfigError(
            f"{folder}: tensors and adapter_config.json disagree, first about {wrong[0][0]}; copy it anew"
        )
    load_saved_modules(model, layout.modules_to_save, tensors)
    bottlenecks = {}
    for layer in layout.layers:
        device = next(modules[layer].parameters()).device
        bottleneck = Bottleneck(layout.width, layout.bottleneck, layout.activation, device=device, generator=None)
        with torch.no_grad():
            for key, parameter in bottleneck.by_key(layer).items():
                parameter.copy_(tensors[key])
        bottleneck.requires_grad_(False)
        insert_bottleneck(modules[layer], bottleneck)
        bottlenecks[layer] = bottleneck
    return LoadedAdapter(layout, bottlenecks)
