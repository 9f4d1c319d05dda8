"""Classification: cross-entropy over classes, from a score head."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from edge_node.objectives.base import Loss, NoReference
from edge_node.objectives.sequence_scores import labels_of, sequence_scores
from edge_node.stage.stage import Stage
from plutino.data.batches import MicroBatchRows
from plutino.job.objective import ClassificationConfig


class ClassificationObjective(NoReference):
    """Summed over rows and divided by the step's number of them; a row's values are its logits."""

    def __init__(self, config: ClassificationConfig) -> None:
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
        total = functional.cross_entropy(scores_BK, labels_of(rows, scores_BK.device).long(), reduction="sum")
        return Loss(total / loss_weight, float(total.detach()), scores_BK.detach())
