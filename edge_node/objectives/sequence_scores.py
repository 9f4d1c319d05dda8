"""What the score head says of a sequence: its output at the token that stands for it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from edge_node.stage.stage import Stage
from plutino.data.batches import MicroBatchRows

# Shape suffixes: B rows, T tokens, D hidden size, K outputs of the score head.


def sequence_scores(stage: Stage, hidden_BTD: Tensor, rows: MicroBatchRows) -> Tensor:
    """Scores [B, K] in fp32, where transformers' ``*ForSequenceClassification`` takes them.

    Encoders give them at the first token. Decoders do at the rightmost token that is not the model's pad token: also
    where the row itself ends with that token, so that a model whose pad token is its end token scores alike here and
    there.
    """
    if stage.family.score_head is not None and stage.family.score_head.reads == "first token":
        return stage.score(hidden_BTD[:, 0])
    last_B = torch.from_numpy(_last_tokens(rows, getattr(stage.config, "pad_token_id", None)))
    hidden_BD = hidden_BTD[torch.arange(len(last_B)), last_B.to(hidden_BTD.device)]
    return stage.score(hidden_BD)


def labels_of(rows: MicroBatchRows, device: torch.device) -> Tensor:
    """The rows' labels [B] in fp32."""
    assert rows.labels is not None, "rows of this objective come with labels"
    return torch.from_numpy(rows.labels).to(device)


def _last_tokens(rows: MicroBatchRows, pad_token_id: int | None) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    last = np.empty(len(rows.lengths), np.int64)
    start = 0
    for row, length in enumerate(rows.lengths.tolist()):
        own = rows.input_ids[start : start + length]
        others = np.flatnonzero(own != pad_token_id) if pad_token_id is not None else np.arange(length)
        # transformers falls back to the first token where all of them are padding.
        last[row] = others[-1] if len(others) else 0
        start += length
    return last
