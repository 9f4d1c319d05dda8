"""Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290) against the pipeline's own base model."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from edge_node.objectives.base import Loss
from edge_node.objectives.label_tokens import row_logps
from edge_node.objectives.pairs import pair_rows
from edge_node.stage.stage import Stage
from plutino.data.batches import MicroBatchRows
from plutino.job.objective import DpoConfig


class DpoObjective:
    """Summed over pairs and divided by the step's number of them.

    A row's value is its implicit reward: beta times what the policy's log-probability lies above the reference's.
    """

    def __init__(self, config: DpoConfig) -> None:
        self.config = config
        self.runs_reference = self.compares_measured_rows = config.runs_reference

    def loss(
        self,
        stage: Stage,
        hidden_BTD: Tensor,
        rows: MicroBatchRows,
        loss_weight: float,
        reference: Tensor | None = None,
    ) -> Loss:
        """See :class:`edge_node.objectives.base.Objective`."""
        policy_B = self._logps(stage, hidden_BTD, rows)
        if reference is None:
            assert rows.reference_logps is not None, "reference: rows was asked for"
            reference = torch.from_numpy(rows.reference_logps)
        above_B = policy_B - reference.to(policy_B.device)
        chosen, rejected = (index.to(above_B.device) for index in pair_rows(rows))
        total = self._of_margins(above_B[chosen] - above_B[rejected]).sum()
        return Loss(total / loss_weight, float(total.detach()), self.config.beta * above_B.detach()[:, None])

    def reference(self, stage: Stage, hidden_BTD: Tensor, rows: MicroBatchRows) -> Tensor:
        """See :class:`edge_node.objectives.base.Objective`."""
        return self._logps(stage, hidden_BTD, rows)

    def _logps(self, stage: Stage, hidden_BTD: Tensor, rows: MicroBatchRows) -> Tensor:
        return row_logps(stage, hidden_BTD, rows, average=self.config.average_logps)

    def _of_margins(self, margin_P: Tensor) -> Tensor:
        beta, smoothing = self.config.beta, self.config.label_smoothing
        if self.config.loss == "ipo":
            return (margin_P - 1 / (2 * beta)) ** 2
        if self.config.loss == "hinge":
            return torch.relu(1 - beta * margin_P)
        right_P, wrong_P = functional.logsigmoid(beta * margin_P), functional.logsigmoid(-beta * margin_P)
        return -(1 - smoothing) * right_P - smoothing * wrong_P
