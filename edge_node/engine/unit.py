"""A unit as a worker sees it: what it gets before it starts, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass

from edge_node.engine.recorder import StepRecorder
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
