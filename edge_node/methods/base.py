"""What a fine-tuning method is to the executor: trainable parameters by global name, attached to one stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

Role = str
"""Part of the model in which a trainable parameter is used: "embedding", "head", "block" for what one block alone
has, and :func:`block_role` for each use of what several blocks share."""


def block_role(block: int) -> Role:
    """The role of a use in one block of a parameter that several blocks use.

    Gradients are summed over roles. With a role a block their order is that of the blocks, whatever stages they are on.
    """
    return f"block {block}"


@dataclass(frozen=True, slots=True)
class TrainableParameter:
    """One parameter of the job, which several stages may hold."""

    name: str
    """Global name: exactly the key that peft's save_pretrained writes, but for tensors that are cut over the stages
    (``MethodPart.checkpoint_of`` joins them). A parameter that embedding and head share goes by the embedding's key on
    every stage."""
    uses: tuple[tuple[Role, nn.Parameter], ...]
    """This stage's fp32 parameters that are this global one, in the order of ``all_roles``. Two uses on one stage
    are two Parameters on one storage, so that each accumulates its own gradient."""
    all_roles: tuple[Role, ...]
    """Roles over all stages of the model, in the same order: who must add up gradients with whom."""
    copies: tuple[nn.Parameter, ...] = ()
    """What this stage computes with in another dtype: whoever changes the parameter calls :meth:`refresh`."""

    @torch.no_grad()
    def refresh(self) -> None:
        """Let the copies have the parameter's value."""
        for copy in self.copies:
            copy.copy_(self.uses[0][1])


class AttachedMethod(Protocol):
    """A method on one stage. Joined over the stages, the states are one peft checkpoint."""

    @property
    def parameters(self) -> tuple[TrainableParameter, ...]:
        """Sorted by name; empty if nothing of this stage is trained."""

    @property
    def num_prompt_tokens(self) -> int:
        """Virtual tokens that the first stage puts before every row; 0 while switched off. The same on every stage."""

    def set_enabled(self, enabled: bool) -> None:
        """Switch between the adapted model and exactly the base model."""

    def state(self) -> dict[str, Tensor]:
        """This stage's part of the checkpoint: fp32 copies by peft's keys.

        A parameter that embedding and head share appears under the key of each role that this stage holds, as peft
        writes it.
        """

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Copy values into the stage's parameters, in place; names of other stages are ignored.

        ``state`` is what :meth:`state` gave, joined over stages, or a published checkpoint.

        Raises:
            ConfigError: a name of this stage is missing, or a tensor has another shape.
        """

    def peft_config(self) -> dict[str, Any]:
        """Content of adapter_config.json for the whole model, the same on every stage."""


@runtime_checkable
class Derives(Protocol):
    """A method whose checkpoint is computed from what it trains, because stock peft stores the result."""

    def derived(self) -> dict[str, Tensor]:
        """fp32 tensors of this stage's blocks, by the names that ``MethodPart.checkpoint_of`` takes."""
