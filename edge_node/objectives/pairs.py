"""Preference pairs: which row of a micro-batch is preferred to which."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from plutino.data.batches import MicroBatchRows


def pair_rows(rows: MicroBatchRows) -> tuple[Tensor, Tensor]:
    """Rows of the chosen and of the rejected answers, [pairs] each, in the order of the chosen ones."""
    assert rows.pair_ids is not None, "rows of this objective come in pairs"
    _, first, inverse = np.unique(rows.pair_ids, return_index=True, return_inverse=True)
    is_chosen = np.zeros(len(rows.pair_ids), bool)
    is_chosen[first] = True
    chosen = np.flatnonzero(is_chosen)
    rejected_of = {int(inverse[row]): int(row) for row in np.flatnonzero(~is_chosen)}
    rejected = [rejected_of[int(inverse[row])] for row in chosen]
    return torch.from_numpy(chosen), torch.tensor(rejected)
