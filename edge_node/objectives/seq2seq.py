"""Sequence to sequence: cross-entropy of the target's tokens under an encoder-decoder that has read the source."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from edge_node.objectives.base import Loss, NoReference
from edge_node.objectives.label_tokens import token_logits, total_cross_entropy
from edge_node.stage.stage import Stage
from plutino.data.batches import MicroBatchRows
from plutino.job.objective import Seq2SeqConfig

# Shape suffixes: B rows, T target tokens, D hidden size, N target tokens of all rows, V vocabulary.


class Seq2SeqObjective(NoReference):
    """The mean over the targets' tokens, the end token among them, as their rows weigh them."""

    def __init__(self, config: Seq2SeqConfig) -> None:
        self.config = config

    def loss(
        self,
        stage: Stage,
        hidden_BTD: Tensor,
        rows: MicroBatchRows,
        loss_weight: float,
        reference_B: Tensor | None = None,
    ) -> Loss:
        """See :class:`edge_node.objectives.base.Objective`."""
        is_target = rows.label_mask.astype(bool)
        if not is_target.any():
            return Loss(None, 0.0)
        row_of = np.repeat(np.arange(len(rows.lengths)), rows.lengths)
        num_target_B = np.bincount(row_of, weights=is_target, minlength=len(rows.lengths))
        # What predicts a target's token t stands at t, behind the start token.
        is_predicted_BT = np.arange(hidden_BTD.shape[1]) < num_target_B[:, None]
        logits_NV = token_logits(stage, hidden_BTD, torch.from_numpy(np.flatnonzero(is_predicted_BT)))
        labels_N = torch.from_numpy(rows.input_ids[is_target].astype(np.int64)).to(logits_NV.device)
        total = total_cross_entropy(logits_NV, labels_N, rows)
        return Loss(total / loss_weight, float(total.detach()))
