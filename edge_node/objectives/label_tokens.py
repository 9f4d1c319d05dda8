"""Losses over label tokens: the head runs only on positions whose next token carries loss.

For short answers to long prompts that leaves out nearly all of the head's work and of the logits' memory, and changes
no loss. Packed rows need nothing of their own here: a segment's first token never carries loss.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from edge_node.objectives.base import Loss, NoReference
from edge_node.stage.placing import to_device
from edge_node.stage.stage import Stage
from plutino.data.batches import MicroBatchRows

# Shape suffixes: B rows, T tokens, D hidden size, N positions that carry loss, V vocabulary.


class LabelTokenLoss(NoReference):
    """Cross-entropy of the next token: the mean over the step's label tokens, as its rows weigh them."""

    def loss(
        self,
        stage: Stage,
        hidden_BTD: Tensor,
        rows: MicroBatchRows,
        loss_weight: float,
        reference: Tensor | None = None,
    ) -> Loss:
        """See :class:`edge_node.objectives.base.Objective`."""
        positions_N, labels_N, _ = label_positions(rows, hidden_BTD.shape[1])
        if len(labels_N) == 0:
            return Loss(None, 0.0)
        logits_NV = token_logits(stage, hidden_BTD, positions_N)
        total = total_cross_entropy(logits_NV, to_device(labels_N, logits_NV.device), rows)
        seen = total.detach()
        return Loss(total / loss_weight, seen if seen.is_cuda else float(seen))


def total_cross_entropy(logits_NV: Tensor, labels_N: Tensor, rows: MicroBatchRows) -> Tensor:
    """Sum over the label tokens of a micro-batch, each by its weight."""
    if not rows.length_discount:
        return functional.cross_entropy(logits_NV, labels_N, reduction="sum")
    # A sum over rows by their numbers would have another order in every run on a card.
    weights_N = to_device(label_weights(rows), logits_NV.device)
    return (functional.cross_entropy(logits_NV, labels_N, reduction="none") * weights_N).sum()


def label_weights(rows: MicroBatchRows) -> Tensor:
    """What each label token counts by, [N] in fp32: see :attr:`MicroBatchRows.length_discount`."""
    lengths = rows.lengths if rows.segment_lengths is None else rows.segment_lengths
    of_label_N = np.repeat(np.arange(len(lengths)), lengths)[rows.label_mask.astype(bool)]
    counts = np.bincount(of_label_N, minlength=len(lengths))
    return torch.from_numpy((counts[of_label_N] ** -rows.length_discount).astype(np.float32))


def row_logps(stage: Stage, hidden_BTD: Tensor, rows: MicroBatchRows, *, average: bool = False) -> Tensor:
    """Log-probability of each row's label tokens, [B] in fp32: their sum, or their mean.

    A row without label tokens has 0.
    """
    positions_N, labels_N, rows_N = label_positions(rows, hidden_BTD.shape[1])
    logits_NV = token_logits(stage, hidden_BTD, positions_N)
    logps_N = -functional.cross_entropy(logits_NV, labels_N.to(logits_NV.device), reduction="none")
    rows_N = rows_N.to(logps_N.device)
    sums_B = torch.zeros(len(rows.lengths), device=logps_N.device).index_add(0, rows_N, logps_N)
    if not average:
        return sums_B
    return sums_B / torch.bincount(rows_N, minlength=len(rows.lengths)).clamp(min=1)


def label_positions(rows: MicroBatchRows, padded_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Flat positions (row * padded_tokens + token) that predict a label token, those labels, and their rows; [N]."""
    positions: list[Tensor] = []
    labels: list[Tensor] = []
    row_numbers: list[Tensor] = []
    ids = torch.from_numpy(rows.input_ids)
    mask = torch.from_numpy(rows.label_mask)
    start = 0
    for row, length in enumerate(rows.lengths):
        where = mask[start + 1 : start + length].nonzero().squeeze(1)
        positions.append(where + row * padded_tokens)
        labels.append(ids[start + 1 : start + length][where].long())
        row_numbers.append(torch.full_like(where, row))
        start += length
    return torch.cat(positions), torch.cat(labels), torch.cat(row_numbers)


def token_logits(stage: Stage, hidden_BTD: Tensor, positions_N: Tensor) -> Tensor:
    """Logits [N, V] in fp32."""
    hidden_ND = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])[to_device(positions_N, hidden_BTD.device)]
    return stage.head(hidden_ND).float()
