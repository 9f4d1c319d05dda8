"""A job's loss on a few rows by stock transformers: the second opinion that a published adapter is held against.

Written from the objectives' definitions and not from the devices' code, which it checks. Entry point:
:func:`loss_sum_of`. It imports torch, so only :mod:`coordinator.artifacts.verify` may import it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from coordinator.artifacts.verify_process import Probe, ProbeRows
from plutino.errors import ExportError
from plutino.job.objective import DpoConfig, RewardConfig, Seq2SeqConfig
from plutino.job.objective_part import LENGTH_DISCOUNTS

# Shape suffixes: B rows, P pairs, S padded tokens of a source, T padded tokens, V vocabulary, N label tokens.

_NO_LABEL = -100
"""What transformers takes for no label, and for padding in what an encoder-decoder's decoder gets."""


def loss_sum_of(model: Any, probe: Probe, without_adapter: Callable[[], AbstractContextManager[Any]]) -> float:
    """The sum of losses of the probe's rows.

    Raises:
        ExportError: the model's outputs are not finite.
    """
    objective = probe.objective
    discount = LENGTH_DISCOUNTS.get(probe.counted, 0.0)
    total = 0.0
    for rows in probe.micro_batches:
        if isinstance(objective, DpoConfig):
            discount = float(objective.average_logps)
            policy_B = _row_logps(model, rows, discount)
            if objective.runs_reference:
                with without_adapter():
                    reference_B = _row_logps(model, rows, discount)
            else:
                reference_B = torch.tensor(rows.reference_logps)
            total += float(_dpo(objective, *_pairs(policy_B - reference_B, rows)))
        elif isinstance(objective, Seq2SeqConfig):
            total += _target_loss(model, rows, discount)
        elif objective is not None and objective.has_score_head:
            total += float(_scored(objective, _scores(model, rows), rows))
        else:
            total -= float(_row_logps(model, rows, discount).sum())
    return total


def padded(rows: ProbeRows) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, attention mask and label mask of a micro-batch, each [B, T], padded on the right with 0."""
    shape = (len(rows.lengths), rows.padded_tokens)
    ids_BT, attention_BT, labels_BT = (torch.zeros(shape, dtype=torch.long) for _ in range(3))
    start = 0
    for row, length in enumerate(rows.lengths):
        ids_BT[row, :length] = torch.tensor(rows.input_ids[start : start + length])
        labels_BT[row, :length] = torch.tensor(rows.label_mask[start : start + length])
        attention_BT[row, :length] = 1
        start += length
    return ids_BT, attention_BT, labels_BT


def _row_logps(model: Any, rows: ProbeRows, discount: float) -> Tensor:
    """Sum over each row's n label tokens, by n ** discount: 1 gives the mean."""
    ids_BT, attention_BT, labels_BT = padded(rows)
    logits_BTV = model(input_ids=ids_BT, attention_mask=attention_BT, use_cache=False).logits
    # Virtual tokens of a prompt stand before the row's own.
    logits_BTV = logits_BTV[:, -ids_BT.shape[1] :]
    _require_finite(logits_BTV[attention_BT.bool()], rows)
    # Token t is predicted at position t - 1.
    is_label_BT = labels_BT[:, 1:].bool()
    sums = []
    for row in range(len(rows.lengths)):
        labels_N = ids_BT[row, 1:][is_label_BT[row]]
        logits_NV = logits_BTV[row, :-1][is_label_BT[row]].float()
        logp = -functional.cross_entropy(logits_NV, labels_N, reduction="sum")
        sums.append(logp / max(1, len(labels_N)) ** discount)
    return torch.stack(sums)


def _target_loss(model: Any, rows: ProbeRows, discount: float) -> float:
    """Cross-entropy of what an encoder-decoder writes of what it reads.

    One pass for all rows: row by row, each would read the whole base from memory.
    """
    sources, targets = [], []
    start = 0
    for length in rows.lengths:
        ids = torch.tensor(rows.input_ids[start : start + length])
        is_target = torch.tensor(rows.label_mask[start : start + length]).bool()
        sources.append(ids[~is_target])
        targets.append(ids[is_target])
        start += length
    attention_BS = pad_sequence([torch.ones_like(source) for source in sources], batch_first=True)
    labels_BT = pad_sequence(targets, batch_first=True, padding_value=_NO_LABEL)
    logits_BTV = model(
        input_ids=pad_sequence(sources, batch_first=True), attention_mask=attention_BS, labels=labels_BT
    ).logits
    total = 0.0
    for logits_TV, target in zip(logits_BTV, targets, strict=True):
        logits_NV = logits_TV[: len(target)].float()
        _require_finite(logits_NV, rows)
        total += float(functional.cross_entropy(logits_NV, target, reduction="sum")) / max(1, len(target)) ** discount
    return total


def _scores(model: Any, rows: ProbeRows) -> Tensor:
    ids_BT, attention_BT, _ = padded(rows)
    pad_token_id = getattr(model.config, "pad_token_id", None)
    if pad_token_id is None:  # transformers then scores rows of unlike lengths one by one only
        length_of = attention_BT.sum(dim=1).tolist()
        scores = [model(input_ids=ids_BT[row : row + 1, :length]).logits for row, length in enumerate(length_of)]
        scores_BK = torch.cat(scores)
    else:
        ids_BT = ids_BT.masked_fill(attention_BT == 0, pad_token_id)
        scores_BK = model(input_ids=ids_BT, attention_mask=attention_BT, **_token_types(model, rows, ids_BT)).logits
    _require_finite(scores_BK, rows)
    return scores_BK.float()


def _token_types(model: Any, rows: ProbeRows, ids_BT: Tensor) -> dict[str, Tensor]:
    """Which tokens are of the second of two texts, for models that tell."""
    if not rows.second_starts or getattr(model.config, "type_vocab_size", 1) < 2:
        return {}
    is_behind_BT = torch.arange(ids_BT.shape[1]) >= torch.tensor(rows.second_starts)[:, None]
    is_own_BT = torch.arange(ids_BT.shape[1]) < torch.tensor(rows.lengths)[:, None]
    return {"token_type_ids": (is_behind_BT & is_own_BT).long()}


def _scored(objective: Any, scores_BK: Tensor, rows: ProbeRows) -> Tensor:
    if isinstance(objective, RewardConfig) and objective.labels == "pairs":
        chosen_P, rejected_P = _pairs(scores_BK[:, 0], rows)
        centred = objective.center_coefficient * ((chosen_P + rejected_P) ** 2).sum()
        return centred - functional.logsigmoid(chosen_P - rejected_P).sum()
    labels_B = torch.tensor(rows.labels)
    if objective.type == "classification":
        return functional.cross_entropy(scores_BK, labels_B.long(), reduction="sum")
    if isinstance(objective, RewardConfig) and objective.rating_loss == "bce":
        return functional.binary_cross_entropy_with_logits(scores_BK[:, 0], labels_B, reduction="sum")
    return ((scores_BK[:, 0] - labels_B) ** 2).sum()


def _dpo(objective: DpoConfig, chosen_P: Tensor, rejected_P: Tensor) -> Tensor:
    margin_P = chosen_P - rejected_P
    if objective.loss == "ipo":
        return ((margin_P - 0.5 / objective.beta) ** 2).sum()
    if objective.loss == "hinge":
        return (1 - objective.beta * margin_P).clamp(min=0).sum()
    # -log sigmoid(x) = softplus(-x)
    right_P, wrong_P = functional.softplus(-objective.beta * margin_P), functional.softplus(objective.beta * margin_P)
    return ((1 - objective.label_smoothing) * right_P + objective.label_smoothing * wrong_P).sum()


def _pairs(values_B: Tensor, rows: ProbeRows) -> tuple[Tensor, Tensor]:
    """Values of the chosen and of the rejected rows: of two with one pair id the first is the chosen one."""
    by_pair: dict[int, list[int]] = {}
    for row, pair in enumerate(rows.pair_ids):
        by_pair.setdefault(pair, []).append(row)
    chosen, rejected = zip(*by_pair.values(), strict=True)
    return values_B[list(chosen)], values_B[list(rejected)]


def _require_finite(values: Tensor, rows: ProbeRows) -> None:
    if not bool(values.isfinite().all()):
        raise ExportError(
            f"logits of the reloaded adapter are not finite on {len(rows.lengths)} probe rows; "
            "nothing was published: go on from an earlier checkpoint with a lower training.lr"
        )
