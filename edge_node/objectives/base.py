"""What an objective is to the executor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from edge_node.stage.build import Stage
from plutino.data.batches import MicroBatchRows


@dataclass(frozen=True, slots=True)
class Loss:
    """The loss of one micro-batch."""

    scaled: Tensor | None
    """Scalar to back-propagate: the sum of token losses over the step's global loss weight. None: nothing in the
    micro-batch carries loss."""
    sum: float
    """Sum of token losses, in nats."""


class Objective(Protocol):
    """Turns the last stage's hidden states into a loss."""

    def loss(self, stage: Stage, hidden_BTD: Tensor, rows: MicroBatchRows, loss_weight: float) -> Loss:
        """Loss of one right-padded micro-batch.

        Args:
            stage: the last stage, for its head.
            hidden_BTD: hidden states after the final norm.
            rows: the micro-batch's tokens and which of them carry loss.
            loss_weight: the step's global weight N; the sum of ``scaled`` over the step's micro-batches is the mean.
        """
