"""A reward model: a score head, taught by preference pairs or by ratings."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from edge_node.objectives.base import Loss, NoReference
from edge_node.objectives.pairs import pair_rows
from edge_node.objectives.sequence_scores import labels_of, sequence_scores
from edge_node.stage.stage import Stage
from plutino.data.batches import MicroBatchRows
from plutino.job.objective import RewardConfig


class RewardObjective(NoReference):
    """Summed over pairs (or rated answers) and divided by the step's number of them; a row's value is its reward."""

    def __init__(self, config: RewardConfig) -> None:
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
        rewards_BK = sequence_scores(stage, hidden_BTD, rows)
        rewards_B = rewards_BK[:, 0]
        total = self._of_pairs(rewards_B, rows) if self.config.labels == "pairs" else self._of_ratings(rewards_B, rows)
        return Loss(total / loss_weight, float(total.detach()), rewards_BK.detach())

    def _of_pairs(self, rewards_B: Tensor, rows: MicroBatchRows) -> Tensor:
        chosen, rejected = pair_rows(rows)
        chosen_P, rejected_P = rewards_B[chosen.to(rewards_B.device)], rewards_B[rejected.to(rewards_B.device)]
        total = -functional.logsigmoid(chosen_P - rejected_P).sum()
        if self.config.center_coefficient:
            total = total + self.config.center_coefficient * ((chosen_P + rejected_P) ** 2).sum()
        return total

    def _of_ratings(self, rewards_B: Tensor, rows: MicroBatchRows) -> Tensor:
        ratings_B = labels_of(rows, rewards_B.device)
        if self.config.rating_loss == "mse":
            return functional.mse_loss(rewards_B, ratings_B, reduction="sum")
        return functional.binary_cross_entropy_with_logits(rewards_B, ratings_B, reduction="sum")
