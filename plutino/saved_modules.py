"""Modules of the base model itself that a checkpoint of plutino's own layouts repeats, trained: peft's modules_to_save.

A score head is one: the loaded model has it newly drawn, and the checkpoint holds what was trained. Needs torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from plutino.errors import ConfigError

KEY_PREFIX = "base_model.model."
"""Before the base model's own names in a checkpoint, as peft has it."""


def saved_shapes(model: nn.Module, modules: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Tensors of a checkpoint that belong to these modules, with the shapes that the model asks for.

    Args:
        model: the base model; it needs no weights.
        modules: their names in it.

    Raises:
        ConfigError: the model lacks one.
    """
    return {key: tuple(parameter.shape) for key, parameter in _parameters(model, modules).items()}


@torch.no_grad()
def load_saved_modules(model: nn.Module, modules: Iterable[str], tensors: Mapping[str, Tensor]) -> None:
    """Put a checkpoint's values into these modules, in place and in the model's own dtype.

    Args:
        model: the base model.
        modules: their names in it.
        tensors: the checkpoint; other names are ignored.

    Raises:
        ConfigError: the model lacks one, or it is of another size; nothing was changed.
    """
    own = _parameters(model, modules)
    wrong = [key for key, parameter in own.items() if key not in tensors or tensors[key].shape != parameter.shape]
    if wrong:
        stored = list(tensors[wrong[0]].shape) if wrong[0] in tensors else "nothing"
        raise ConfigError(
            f"{wrong[0]}: the checkpoint has {stored} where the model has {list(own[wrong[0]].shape)}; load the base "
            "model with num_labels as it was trained"
        )
    for key, parameter in own.items():
        parameter.copy_(tensors[key])


def _parameters(model: nn.Module, modules: Iterable[str]) -> dict[str, nn.Parameter]:
    known = dict(model.named_modules())
    found: dict[str, nn.Parameter] = {}
    for module in modules:
        if module not in known:
            raise ConfigError(
                f"the adapter was trained with a score head, and the model has no {module}; load the base model with "
                "AutoModelForSequenceClassification and num_labels as it was trained"
            )
        found |= {f"{KEY_PREFIX}{module}.{key}": p for key, p in known[module].named_parameters()}
    return found
