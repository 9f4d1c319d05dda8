"""A unit as a worker sees it: what it gets before it starts, and what it answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from edge_node.engine.recorder import StepRecorder
from edge_node.engine.stage_input import gradient_name
from edge_node.stage.placing import to_device
from plutino.data.batches import MicroBatchRows
from plutino.types import Unit


@dataclass(frozen=True, slots=True)
class UnitInput:
    """What a worker gets of a unit before it starts."""

    unit: Unit
    num_micro_batches: int
    loss_weight: float
    rows: tuple[MicroBatchRows | None, ...]
    """One per micro-batch on the first and the last stage; None where the stage does not read tokens."""
    without_adapter: bool = False
    """An evaluation of the base model."""
    is_recorded: bool = False
    """A training step of which every span is kept."""
    by_reward_adapter: bool = False
    """An evaluation by the reward adapter."""


@dataclass(slots=True)
class StepTimes:
    """Where the seconds of a unit went."""

    compute_s: float = 0.0
    wait_s: float = 0.0
    """Waiting for a peer's tensors."""
    send_s: float = 0.0
    """Handing tensors to the transport; encoding runs beside the computation."""
    total_s: float = 0.0


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """A worker's vote."""

    squared_norms: tuple[float, ...]
    """Squared L2 norm of every parameter's whole gradient, in the order of the method's parameters."""
    is_finite: bool
    loss_sum: float
    reason: str
    times: StepTimes
    recorder: StepRecorder | None = None
    """What was recorded, where the unit asked for it."""
    counts: Mapping[str, float] = field(default_factory=dict)
    """What the objective counted, summed over this worker's micro-batches."""


@dataclass(slots=True)
class InFlight:
    """A micro-batch between its forward and its backward pass."""

    trained_in: dict[str, Tensor]
    """What came from below and may want a gradient back, by name: :attr:`StageInput.trained`."""
    trained_out: dict[str, Tensor]
    """What the next stage sends a gradient for, or the scaled loss on the last."""
    message: dict[str, Tensor]
    """For the next stage: hidden states, and what travels with them (lengths, position_ids, segment_ids)."""


def back_propagate(flight: InFlight, received: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """Back-propagate one micro-batch; gives the gradients of what came in, if a stage wants them."""
    outputs = {name: output for name, output in flight.trained_out.items() if output.requires_grad}
    if outputs:
        gradients = None
        if received is not None:
            gradients = [to_device(received[gradient_name(name)], o.device) for name, o in outputs.items()]
        torch.autograd.backward(list(outputs.values()), gradients)
    # A micro-batch without label tokens has no gradient; the stages below still wait for one.
    return {
        gradient_name(name): torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        for name, tensor in flight.trained_in.items()
        if tensor.requires_grad
    }


def not_finite(names: Sequence[str], norms: Sequence[float], loss_sum: float, step: int) -> str:
    """What of a step is no number, for people; empty if all is well. ``norms`` are squared, in the order of names."""
    if not math.isfinite(loss_sum):
        return f"the loss of step {step} is {loss_sum}"
    for name, norm in zip(names, norms, strict=True):
        if not math.isfinite(norm):
            return f"the gradient of {name} has squared norm {norm} at step {step}"
    return ""
