"""Regression: squared error of a number, from a score head."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from edge_node.objectives.base import Loss, NoReference
from edge_node.objectives.sequence_scores import labels_of, sequence_scores
from edge_node.stage.stage import Stage
from plutino.data.batches import MicroBatchRows
from plutino.job.objective import RegressionConfig


class RegressionObjective(NoReference):
    """Summed over rows and divided by the step's number of them; a row's value is what was predicted."""

    def __init__(self, config: RegressionConfig) -> None:
        self.config = config

    def loss(
        self,
        stage: Stage,
        hidden_BTD: Tensor,
        rows: MicroBatchRows,
        loss_weight: float,
        reference: Tensor | None = None,
    ) -> Loss:
        """See :class:`edge_node.objectives.base.Objective`."""
        scores_BK = sequence_scores(stage, hidden_BTD, rows)
        total = functional.mse_loss(scores_BK[:, 0], labels_of(rows, scores_BK.device), reduction="sum")
        return Loss(total / loss_weight, float(total.detach()), scores_BK.detach())
