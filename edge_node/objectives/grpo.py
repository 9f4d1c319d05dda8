"""Group relative policy optimisation (Shao et al. 2024, arXiv:2402.03300): sampled answers, better ones made likelier.

Rewards and advantages are the coordinator's; here stands what a token of an answer costs. On rows that were not
sampled, which are held-out ones, the loss is that of supervised fine-tuning.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from edge_node.objectives.base import Loss
from edge_node.objectives.label_tokens import label_positions, token_logits
from edge_node.stage.stage import Stage
from plutino.data.batches import MicroBatchRows
from plutino.job.objective import GrpoConfig

# Shape suffixes: B rows, T tokens, D hidden size, K most label tokens of a row, N label tokens of all rows.

KL_SUM, NUM_CLIPPED, NUM_TOKENS = "kl_sum", "num_clipped", "num_tokens"
"""Counts of a micro-batch: KL divergence from the base summed over tokens, tokens whose ratio did not count, tokens."""


class GrpoObjective:
    """Summed over answers (or tokens) and divided by the step's number of them, as ``config.loss`` says.

    Values of rows that were sampled are their tokens' log-probabilities, padded with zeros.
    """

    compares_measured_rows = False

    def __init__(self, config: GrpoConfig) -> None:
        self.config = config
        self.runs_reference = config.runs_reference

    def loss(
        self,
        stage: Stage,
        hidden_BTD: Tensor,
        rows: MicroBatchRows,
        loss_weight: float,
        reference: Tensor | None = None,
    ) -> Loss:
        """See :class:`edge_node.objectives.base.Objective`."""
        if rows.advantages is None:
            total = -self._logps(stage, hidden_BTD, rows, temperature=1.0).sum()
            return Loss(total / loss_weight, float(total.detach()))
        logps_N = self._logps(stage, hidden_BTD, rows, temperature=self.config.temperature)
        rows_N = label_positions(rows, hidden_BTD.shape[1])[2].to(logps_N.device)
        advantages_N = torch.from_numpy(rows.advantages).to(logps_N.device)[rows_N]
        sampled_N = logps_N.detach() if rows.sampled_logps is None else torch.from_numpy(rows.sampled_logps)
        low = 1.0 - self.config.clip
        high = 1.0 + (self.config.clip if self.config.clip_high is None else self.config.clip_high)
        ratio_N = torch.exp(logps_N - sampled_N.to(logps_N.device))
        bounded_N = ratio_N.clamp(low, high)
        losses_N = -torch.minimum(ratio_N * advantages_N, bounded_N * advantages_N)
        is_clipped_N = ((ratio_N < low) & (advantages_N < 0)) | ((ratio_N > high) & (advantages_N > 0))
        counts = {NUM_CLIPPED: float(is_clipped_N.sum()), NUM_TOKENS: float(len(losses_N))}
        if reference is not None:
            above_N = reference.to(logps_N.device) - logps_N
            kl_N = torch.exp(above_N) - above_N - 1
            losses_N = losses_N + self.config.beta * kl_N
            counts[KL_SUM] = float(kl_N.detach().sum())
        total = self._total(losses_N, rows_N, len(rows.lengths))
        values_BK = _by_row(logps_N.detach(), rows_N, len(rows.lengths))
        return Loss(total / loss_weight, float(total.detach()), values_BK, counts)

    def reference(self, stage: Stage, hidden_BTD: Tensor, rows: MicroBatchRows) -> Tensor:
        """Log-probability of each label token, [N] in fp32."""
        return self._logps(stage, hidden_BTD, rows, temperature=self.config.temperature)

    def _total(self, losses_N: Tensor, rows_N: Tensor, num_rows: int) -> Tensor:
        if self.config.loss != "grpo":
            return losses_N.sum()
        sums_B = torch.zeros(num_rows, device=losses_N.device).index_add(0, rows_N, losses_N)
        return (sums_B / torch.bincount(rows_N, minlength=num_rows).clamp(min=1)).sum()

    @staticmethod
    def _logps(stage: Stage, hidden_BTD: Tensor, rows: MicroBatchRows, *, temperature: float) -> Tensor:
        positions_N, labels_N, _ = label_positions(rows, hidden_BTD.shape[1])
        logits_NV = token_logits(stage, hidden_BTD, positions_N)
        if temperature != 1.0:
            logits_NV = logits_NV / temperature
        return -functional.cross_entropy(logits_NV, labels_N.to(logits_NV.device), reduction="none")


def _by_row(values_N: Tensor, rows_N: Tensor, num_rows: int) -> Tensor:
    """Values of label tokens [B, K], a row's first at 0."""
    counts_B = torch.bincount(rows_N, minlength=num_rows)
    starts_B = counts_B.cumsum(0) - counts_B
    values_BK = values_N.new_zeros(num_rows, max(1, int(counts_B.max())))
    values_BK[rows_N, torch.arange(len(values_N), device=rows_N.device) - starts_B[rows_N]] = values_N
    return values_BK
