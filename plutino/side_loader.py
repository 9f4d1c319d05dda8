"""Puts a trained side network beside a plain transformers model; :func:`plutino.load_adapter.load_adapter` calls it.

The model's own code runs as ever, with the hooks of :mod:`plutino.side_hooks`. Generation works, with a KV cache too:
the side blocks' layers stand behind the model's own in the same cache. Needs torch and transformers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from plutino.errors import ConfigError
from plutino.families import FAMILIES, family_of
from plutino.saved_modules import load_saved_modules, saved_shapes
from plutino.side_hooks import BesideOneStack, put_beside_halves
from plutino.side_layout import SideLayout
from plutino.side_network import BackboneTap, SideNetwork, copy_values, side_shapes


class LoadedSideNetwork:
    """The side network beside a model, as :func:`load_side_network` put it there."""

    def __init__(self, layout: SideLayout, side: SideNetwork) -> None:
        self.layout = layout
        self.side = side

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Exactly the base model, for a while."""
        self.side.is_enabled = False
        try:
            yield
        finally:
            self.side.is_enabled = True


def read_side_layout(folder: Path) -> SideLayout:
    """The layout that an adapter's folder describes.

    Raises:
        ConfigError: the folder is none of this layout.
    """
    try:
        return SideLayout.model_validate_json((folder / "adapter_config.json").read_bytes())
    except ValidationError as error:
        raise ConfigError(
            f"{folder} holds no side network of plutino: {error.error_count()} of its settings do not fit; copy it anew"
        ) from error


def expected_side_shapes(model: nn.Module, folder: Path) -> dict[str, tuple[int, ...]]:
    """Every tensor that the checkpoint must hold.

    Raises:
        ConfigError: the side network belongs to another model.
    """
    layout = read_side_layout(folder)
    shapes = side_shapes(layout, _checked(model, layout).config.model_type)
    return shapes | saved_shapes(model, layout.modules_to_save)


def load_side_network(model: nn.Module, folder: Path) -> LoadedSideNetwork:
    """Put a published side network beside its base model, in place.

    Args:
        model: the base model, as transformers loads it; in any dtype, on one device.
        folder: holds adapter_config.json and adapter_model.safetensors.

    Raises:
        ConfigError: the folder holds something else, or the side network belongs to another model.
    """
    layout = read_side_layout(folder)
    base_model = _checked(model, layout)
    config = base_model.config
    side = SideNetwork(
        layout,
        config.model_type,
        0,
        layout.num_blocks,
        attention=config._attn_implementation,
        device=base_model.device,
    )
    tensors = load_file(folder / "adapter_model.safetensors")
    expected = {name: tuple(parameter.shape) for name, parameter in side.by_key().items()}
    saved = saved_shapes(model, layout.modules_to_save)
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items() if name not in saved}
    if found != expected:
        wrong = sorted(set(found.items()) ^ set(expected.items()))
        raise ConfigError(
            f"{folder}: tensors and adapter_config.json disagree, first about {wrong[0][0]}; copy it anew"
        )
    copy_values(side, tensors)
    load_saved_modules(model, layout.modules_to_save, tensors)
    side.requires_grad_(False)
    tap = BackboneTap(base_model, family_of(config.model_type), side)
    halves = family_of(config.model_type).halves
    if halves is not None:
        put_beside_halves(base_model, halves, tap, side)
    else:
        # OPT's head calls the decoder inside the base model.
        BesideOneStack(getattr(base_model.base_model, "decoder", base_model.base_model), tap, side)
    return LoadedSideNetwork(layout, side)


def _checked(model: nn.Module, layout: SideLayout) -> PreTrainedModel:
    config = getattr(model, "config", None)
    if not isinstance(model, PreTrainedModel) or getattr(config, "model_type", None) not in FAMILIES:
        raise ConfigError("a side network stands beside a model of transformers of a known family; load one with it")
    config = model.config
    found = (family_of(config.model_type).num_blocks(config.to_dict()), int(config.hidden_size))
    if found != (layout.num_blocks, layout.width):
        raise ConfigError(
            f"the model has {found[0]} blocks of hidden size {found[1]}, the side network belongs to one with "
            f"{layout.num_blocks} of {layout.width}; load the base model that it was trained on: "
            f"{layout.base_model_name_or_path}"
        )
    return model
