"""What a stage gets of a micro-batch: its rows, which travel without padding, as right-padded tensors."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edge_node.stage.architecture import make_position_ids
from edge_node.stage.halves import start_token_id
from edge_node.stage.passes import StageInput
from edge_node.stage.stage import Stage
from plutino.data.batches import MicroBatchRows

# Shape suffixes: B rows of a micro-batch, T tokens, D hidden size, R side width.

TARGET_LENGTHS = "target_lengths"
"""Tokens of each row's target, in the metadata of encoder-decoders; targets are padded to the longest of them."""


def first_stage_input(
    stage: Stage, rows: MicroBatchRows, num_prompt_tokens: int
) -> tuple[StageInput, dict[str, Tensor]]:
    """Right-padded input of the first stage, and what later stages need beside the hidden states.

    Lengths and positions count virtual tokens, so that later stages need not know of them.
    """
    if stage.family.halves is not None:
        return _two_texts_input(stage, rows)
    lengths = torch.as_tensor(np.asarray(rows.lengths, dtype=np.int32)) + num_prompt_tokens
    num_tokens = rows.padded_tokens + num_prompt_tokens
    segment_ids_BT = padded_segments(rows)
    mask_BT = padding_mask(lengths, num_tokens, side="right")
    position_ids_BT = make_position_ids(
        stage.family, attention_mask=mask_BT, segment_ids=segment_ids_BT, shape=(len(rows.lengths), num_tokens)
    )
    inputs = StageInput(
        position_ids=position_ids_BT,
        input_ids=padded_ids(rows, side="right", pad_id=pad_token_id(stage)),
        attention_mask=mask_BT,
        segment_ids=segment_ids_BT,
        token_types=token_types(rows) if stage.family.has_token_types else None,
        num_prompt_tokens=num_prompt_tokens,
    )
    metadata = {"lengths": lengths, "position_ids": position_ids_BT}
    return inputs, metadata if segment_ids_BT is None else {**metadata, "segment_ids": segment_ids_BT}


def later_stage_input(metadata: dict[str, Tensor]) -> StageInput:
    """Input of a stage that gets a right-padded micro-batch from a peer.

    What the stages below computed is taken out of the message; what is left goes on to the next stage. Where their
    blocks did not run, only the side state comes, or nothing yet.
    """
    return StageInput(
        position_ids=metadata["position_ids"],
        hidden=metadata.pop("hidden", None),
        side=metadata.pop("side", None),
        source=metadata.pop("source", None),
        source_side=metadata.pop("source side", None),
        attention_mask=padding_mask(metadata["lengths"], metadata["position_ids"].shape[1], side="right"),
        segment_ids=metadata.get("segment_ids"),
    )


def gradient_name(name: str) -> str:
    """How the gradient of one of :attr:`StageInput.trained` is called on its way back."""
    return f"{name} gradient" if name.startswith("source") else "gradient"


def _two_texts_input(stage: Stage, rows: MicroBatchRows) -> tuple[StageInput, dict[str, Tensor]]:
    """A row's tokens without loss are an encoder-decoder's source, those with it the target, shifted right."""
    is_target = rows.label_mask.astype(bool)
    row_of = np.repeat(np.arange(len(rows.lengths)), rows.lengths)
    num_target_B = np.bincount(row_of, weights=is_target, minlength=len(rows.lengths)).astype(np.int64)
    num_source_B = rows.lengths.astype(np.int64) - num_target_B
    pad_id = pad_token_id(stage)
    ids_BS = _padded(rows.input_ids[~is_target], num_source_B, pad_id)
    labels_BT = _padded(rows.input_ids[is_target], num_target_B, pad_id)
    start_B1 = torch.full((len(labels_BT), 1), start_token_id(stage.config))
    lengths = torch.as_tensor(num_source_B.astype(np.int32))
    position_ids_BS = torch.arange(ids_BS.shape[1]).expand(ids_BS.shape)
    inputs = StageInput(
        position_ids=position_ids_BS,
        input_ids=ids_BS,
        target_ids=torch.cat([start_B1, labels_BT[:, :-1]], dim=1),
        attention_mask=padding_mask(lengths, ids_BS.shape[1], side="right"),
    )
    target_lengths = torch.as_tensor(num_target_B.astype(np.int32))
    return inputs, {"lengths": lengths, "position_ids": position_ids_BS, TARGET_LENGTHS: target_lengths}


def _padded(ids: NDArray[np.int32], lengths_B: NDArray[np.int64], pad_id: int) -> Tensor:
    """Rows [B, T] of tokens that lie one after the other; at least one token wide."""
    ids_BT = np.full((len(lengths_B), max(1, int(lengths_B.max()))), pad_id, np.int64)
    ids_BT[np.arange(ids_BT.shape[1]) < lengths_B[:, None]] = ids
    return torch.from_numpy(ids_BT)


def token_types(rows: MicroBatchRows) -> Tensor | None:
    """0 for tokens of a row's first text and for padding, 1 for those of the second, [B, T]; None: there are none."""
    if rows.second_starts is None:
        return None
    starts_B, lengths_B = (torch.as_tensor(np.asarray(of, np.int64)) for of in (rows.second_starts, rows.lengths))
    index_T = torch.arange(rows.padded_tokens)
    return ((index_T >= starts_B[:, None]) & (index_T < lengths_B[:, None])).long()


def pad_token_id(stage: Stage) -> int:
    """Any token will do, because padding is masked; the model's own keeps it equal to transformers."""
    configured = getattr(stage.config, "pad_token_id", None)
    return 0 if configured is None else int(configured)


def padded_ids(rows: MicroBatchRows, *, side: str, pad_id: int) -> Tensor:
    """Token ids [B, T] of rows that travel without padding."""
    ids_BT = np.full((len(rows.lengths), rows.padded_tokens), pad_id, dtype=np.int64)
    start = 0
    for row, length in enumerate(rows.lengths):
        at = 0 if side == "right" else rows.padded_tokens - length
        ids_BT[row, at : at + length] = rows.input_ids[start : start + length]
        start += length
    return torch.from_numpy(ids_BT)


def padded_segments(rows: MicroBatchRows) -> Tensor | None:
    """Segment of each token [B, T] of packed rows, from 0 up in every row; None: every row is one sequence.

    What pads a row belongs to its first segment here; masks tell it apart.
    """
    if rows.segment_lengths is None:
        return None
    ids_BT = np.zeros((len(rows.lengths), rows.padded_tokens), dtype=np.int64)
    row = at = segment = 0
    for length in rows.segment_lengths.tolist():
        if at == rows.lengths[row]:
            row, at, segment = row + 1, 0, 0
        ids_BT[row, at : at + length] = segment
        at, segment = at + length, segment + 1
    return torch.from_numpy(ids_BT)


def padding_mask(lengths_B: Tensor, padded_tokens: int, *, side: str) -> Tensor | None:
    """1 for real tokens, [B, T]; None when no row is padded, so that attention takes its faster path."""
    if bool((lengths_B == padded_tokens).all()):
        return None
    positions_T = torch.arange(padded_tokens)
    if side == "right":
        return (positions_T < lengths_B[:, None]).long()
    return (positions_T >= padded_tokens - lengths_B[:, None]).long()
