"""What an objective is to the executor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from edge_node.stage.stage import Stage
from plutino.data.batches import MicroBatchRows

# Shape suffixes: B rows, T tokens, D hidden size, K values of a row.


@dataclass(frozen=True, slots=True)
class Loss:
    """The loss of one micro-batch."""

    scaled: Tensor | None
    """Scalar to back-propagate: the sum of losses over the step's global loss weight. None: nothing in the micro-batch
    carries loss."""
    sum: float | Tensor
    """Sum of losses: in nats over label tokens, each by its weight, or over rows (a pair is one row).
    A scalar on a card is not waited for before the step's end."""
    values_BK: Tensor | None = None
    """What the objective says of each row, detached fp32, for scoring; None: nothing that a score is made of."""
    counts: Mapping[str, float] = field(default_factory=dict)
    """What people see of a step besides its loss, to be summed over micro-batches."""


class NoReference:
    """Part of an objective that compares with nothing."""

    runs_reference = False
    compares_measured_rows = False

    def reference(self, stage: Stage, hidden_BTD: Tensor, rows: MicroBatchRows) -> Tensor:
        """Never asked for."""
        raise AssertionError(f"{type(self).__name__} runs no reference")


class Objective(Protocol):
    """Turns the last stage's hidden states into a loss."""

    @property
    def runs_reference(self) -> bool:
        """Whether :meth:`reference` is asked of every micro-batch before its loss, with the adapter switched off."""

    @property
    def compares_measured_rows(self) -> bool:
        """Whether it is asked of micro-batches of evaluations, too."""

    def loss(
        self,
        stage: Stage,
        hidden_BTD: Tensor,
        rows: MicroBatchRows,
        loss_weight: float,
        reference: Tensor | None = None,
    ) -> Loss:
        """Loss of one right-padded micro-batch.

        Args:
            stage: the last stage, for its head.
            hidden_BTD: hidden states after the final norm.
            rows: the micro-batch's tokens, which of them carry loss, and labels.
            loss_weight: the step's global weight N: its label tokens or rows, as ``counted`` of the objective's
                config says.
                The sum of ``scaled`` over the step's micro-batches is the mean.
            reference: what :meth:`reference` gave; None where the objective runs no reference.
        """

    def reference(self, stage: Stage, hidden_BTD: Tensor, rows: MicroBatchRows) -> Tensor:
        """What the base model says of each row [B], or of each label token [N], in fp32."""
