"""Supervised fine-tuning: cross-entropy on the tokens that carry loss.

The head runs only on positions whose next token carries loss. For short answers to long prompts that leaves out nearly
all of the head's work and of the logits' memory, and changes no loss.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from edge_node.objectives.base import Loss
from edge_node.stage.build import Stage
from plutino.data.batches import MicroBatchRows

# Shape suffixes: B rows, T tokens, D hidden size, N positions that carry loss, V vocabulary.


class SftObjective:
    """Cross-entropy of the next token, summed over label tokens and divided by the step's number of them."""

    def loss(self, stage: Stage, hidden_BTD: Tensor, rows: MicroBatchRows, loss_weight: float) -> Loss:
        """See :class:`edge_node.objectives.base.Objective`."""
        positions_N, labels_N = _label_positions(rows, hidden_BTD.shape[1])
        if len(labels_N) == 0:
            return Loss(None, 0.0)
        hidden_ND = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])[positions_N.to(hidden_BTD.device)]
        logits_NV = stage.head(hidden_ND).float()
        total = functional.cross_entropy(logits_NV, labels_N.to(logits_NV.device), reduction="sum")
        return Loss(total / loss_weight, float(total.detach()))


def _label_positions(rows: MicroBatchRows, padded_tokens: int) -> tuple[Tensor, Tensor]:
    """Flat positions (row * padded_tokens + token) that predict a label token, and those labels."""
    positions: list[Tensor] = []
    labels: list[Tensor] = []
    ids = torch.from_numpy(rows.input_ids)
    mask = torch.from_numpy(rows.label_mask)
    start = 0
    for row, length in enumerate(rows.lengths):
        where = mask[start + 1 : start + length].nonzero().squeeze(1)
        positions.append(where + row * padded_tokens)
        labels.append(ids[start + 1 : start + length][where].long())
        start += length
    return torch.cat(positions), torch.cat(labels)
