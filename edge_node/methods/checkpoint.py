"""Parameters of a stage to checkpoint tensors and back, alike for every method."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from edge_node.methods.base import TrainableParameter
from plutino.errors import ConfigError

KEY_PREFIX = "base_model.model."
"""What peft's save_pretrained puts before a model's own names."""


def parameter_state(parameters: Iterable[TrainableParameter]) -> dict[str, Tensor]:
    """fp32 copies by global name, of parameters that are stored under one name."""
    return {p.name: p.uses[0][1].detach().to(torch.float32, copy=True) for p in parameters}


class StoredAsTrained:
    """What methods share whose checkpoint is what they train, each parameter under its own name.

    Args:
        parameters: those of one stage.
        advice: what to do if a checkpoint does not fit, as the end of a message.
    """

    num_prompt_tokens = 0

    def __init__(self, parameters: Iterable[TrainableParameter], *, advice: str) -> None:
        self.parameters: tuple[TrainableParameter, ...] = tuple(sorted(parameters, key=lambda p: p.name))
        self._advice = advice

    def state(self) -> dict[str, Tensor]:
        """This stage's part of the checkpoint: fp32 copies by its keys."""
        return parameter_state(self.parameters)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Copy values into the stage's parameters, in place; names of other stages are ignored.

        Raises:
            ConfigError: a name of this stage is missing, or a tensor has another shape; nothing was changed.
        """
        load_values(
            {p.name: p.uses[0][1] for p in self.parameters},
            {p.name: (p.name,) for p in self.parameters},
            state,
            advice=self._advice,
        )
        for parameter in self.parameters:
            parameter.refresh()


def in_blocks(parameters: Mapping[str, nn.Parameter]) -> list[TrainableParameter]:
    """Parameters that one block alone has, by global name."""
    return [TrainableParameter(name, (("block", own),), ("block",)) for name, own in parameters.items()]


@torch.no_grad()
def load_values(
    targets: Mapping[str, Tensor], keys: Mapping[str, Iterable[str]], state: Mapping[str, Tensor], *, advice: str
) -> None:
    """Copy a checkpoint's values into parameters, in place.

    Args:
        targets: a stage's parameters by global name.
        keys: for each of them, the names under which a checkpoint may hold it; the first that is there counts.
        state: the checkpoint; other names are ignored.
        advice: what to do if it does not fit, as the end of a message.

    Raises:
        ConfigError: a name is missing, or a tensor has another shape; nothing was changed.
    """
    values: list[tuple[Tensor, Tensor]] = []
    problems: list[str] = []
    for name, own in targets.items():
        found = next((state[key] for key in keys[name] if key in state), None)
        if found is None:
            problems.append(f"{name} is missing")
        elif found.shape != own.shape:
            problems.append(f"{name} has shape {list(found.shape)} instead of {list(own.shape)}")
        else:
            values.append((own, found))
    if problems:
        raise ConfigError(
            f"the adapter does not fit the method: {len(problems)} of this stage's {len(targets)} "
            f"parameters cannot be taken from it: {'; '.join(problems[:4])}"
            f"{'; ...' if len(problems) > 4 else ''}. {advice}"
        )
    for target, value in values:
        target.copy_(value)
