"""AdamW over the stage's own parameters, and its state as named tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from edge_node.methods.base import TrainableParameter
from plutino.errors import JobError
from plutino.job.training import TrainingConfig, learning_rate

STATE_KINDS = ("param", "exp_avg", "exp_avg_sq", "adam_step")
"""Prefixes of the tensors in a shadow; the part after the slash is the parameter's global name."""


class StageOptimizer:
    """AdamW for one stage. Every holder of a shared parameter applies the same update to its own copy."""

    def __init__(self, parameters: Sequence[TrainableParameter], config: TrainingConfig, total_steps: int) -> None:
        self._config = config
        self._parameters = tuple(parameters)
        self._total_steps = total_steps
        # A parameter with two uses in this stage is one storage: its first use stands for it.
        self._owned: dict[str, nn.Parameter] = {p.name: p.uses[0][1] for p in parameters}
        self._adamw: torch.optim.AdamW | None = None
        if self._owned:
            self._adamw = torch.optim.AdamW(
                list(self._owned.values()),
                lr=config.lr,
                betas=config.betas,
                eps=config.eps,
                weight_decay=config.weight_decay,
                fused=all(p.device.type in ("cpu", "cuda") for p in self._owned.values()),
            )

    def apply(self, step: int, gradients: Mapping[str, Tensor], clip_scale: float) -> None:
        """Apply one committed step.

        Args:
            step: its number.
            gradients: the whole, unclipped ones by global name; they are changed. A parameter without one is left as
                it is, its moments and its count of steps included.
            clip_scale: they are multiplied with it.
        """
        if self._adamw is None or not gradients:
            return
        if clip_scale != 1.0:
            torch._foreach_mul_(list(gradients.values()), clip_scale)
        for name, parameter in self._owned.items():
            parameter.grad = gradients.get(name)
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate(step, self._config, self._total_steps)
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)
        self._refresh()

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of parameters and moments, under ``param/<name>``, ``exp_avg/<name>``, ..., in the host's memory."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self._owned.items():
            state = self._state_of(parameter)
            tensors[f"param/{name}"] = parameter.detach().to("cpu", copy=True)
            tensors[f"exp_avg/{name}"] = state["exp_avg"].to("cpu", copy=True)
            tensors[f"exp_avg_sq/{name}"] = state["exp_avg_sq"].to("cpu", copy=True)
            tensors[f"adam_step/{name}"] = state["step"].to("cpu", copy=True)
        return tensors

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Load what :meth:`snapshot` gave, of this or of any other partition.

        Raises:
            JobError: a parameter of this stage is missing.
        """
        missing = [n for n in self._owned if any(f"{kind}/{n}" not in tensors for kind in STATE_KINDS)]
        if missing:
            raise JobError(f"the shadows lack {len(missing)} of {len(self._owned)} parameters, first {missing[0]}")
        for name, parameter in self._owned.items():
            state = self._state_of(parameter)
            with torch.no_grad():
                parameter.copy_(tensors[f"param/{name}"])
            state["exp_avg"].copy_(tensors[f"exp_avg/{name}"])
            state["exp_avg_sq"].copy_(tensors[f"exp_avg_sq/{name}"])
            state["step"].copy_(tensors[f"adam_step/{name}"])
        self._refresh()

    def _refresh(self) -> None:
        for parameter in self._parameters:
            parameter.refresh()

    def _state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        assert self._adamw is not None
        state: dict[str, Tensor] = self._adamw.state[parameter]
        if not state:  # torch makes the moments in the first step; a shadow may come before it
            # Where the fused kernel wants it: beside the parameter.
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state
