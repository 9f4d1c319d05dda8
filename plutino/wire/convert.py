"""Values of plutino.data to and from their protobuf messages.

What arrives is not trusted: sizes, lengths and token ids are checked against the job's bounds before they are used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plutino.data.batches import MicroBatchRows
from plutino.errors import FrameError
from plutino.types import JobId, Unit, UnitKind, WorkerRef
from protos import agents_pb2, workers_pb2


def micro_batch_to_proto(rows: MicroBatchRows) -> workers_pb2.MicroBatch:
    """Encode a micro-batch; its sample indices travel in the message around it (BatchPart, GenerateOptions)."""
    return workers_pb2.MicroBatch(
        lengths=rows.lengths.tolist(),
        input_ids=rows.input_ids.astype("<i4", copy=False).tobytes(),
        label_mask=rows.label_mask.tobytes(),
        padded_tokens=rows.padded_tokens,
        segment_lengths=_listed(rows.segment_lengths),
        labels=_listed(rows.labels),
        pair_ids=_listed(rows.pair_ids),
        reference_logps=_listed(rows.reference_logps),
        second_starts=_listed(rows.second_starts),
        advantages=_listed(rows.advantages),
        sampled_logps=_listed(rows.sampled_logps),
        length_discount=rows.length_discount,
    )


def micro_batch_from_proto(
    message: workers_pb2.MicroBatch,
    *,
    max_rows: int,
    max_tokens: int,
    vocab_size: int,
    sample_indices: Sequence[int] = (),
) -> MicroBatchRows:
    """Decode a micro-batch.

    Args:
        message: what arrived.
        max_rows: most rows of a micro-batch in this job.
        max_tokens: most tokens of a row, padding included.
        vocab_size: rows of the model's embedding; an id outside it would read foreign memory on some kernels.
        sample_indices: positions of the rows in the data set, where the message around it carries them.

    Raises:
        FrameError: a size, a length, a token id or a mask value is out of its bounds.
    """
    num_rows = len(message.lengths)
    _check(1 <= num_rows <= max_rows, f"{num_rows} rows where 1 to {max_rows} are allowed")
    padded_tokens = message.padded_tokens
    _check(1 <= padded_tokens <= max_tokens, f"rows of {padded_tokens} tokens where 1 to {max_tokens} are allowed")
    lengths = np.array(message.lengths, np.int64)
    shortest, longest = int(lengths.min()), int(lengths.max())
    _check(shortest >= 1, "a row without tokens")
    _check(longest <= padded_tokens, f"a row of {longest} tokens in a micro-batch padded to {padded_tokens}")
    num_tokens = int(lengths.sum())
    ids_bytes, mask_bytes = len(message.input_ids), len(message.label_mask)
    _check(ids_bytes == 4 * num_tokens, f"{ids_bytes} bytes of token ids for {num_tokens} tokens of 4 bytes")
    _check(mask_bytes == num_tokens, f"{mask_bytes} bytes of label mask for {num_tokens} tokens of 1 byte")
    _check(len(sample_indices) in (0, num_rows), f"{len(sample_indices)} sample indices for {num_rows} rows")
    _check_segments(message.segment_lengths, lengths)
    second_starts = np.array(message.second_starts, np.int64)
    if len(second_starts):
        fits = len(second_starts) == num_rows and bool((second_starts <= lengths).all())
        _check(fits, f"{len(second_starts)} second texts that do not begin inside {num_rows} rows")
    for name, values in (
        ("labels", message.labels),
        ("reference log-probabilities", message.reference_logps),
        ("advantages", message.advantages),
    ):
        _check(len(values) in (0, num_rows), f"{len(values)} {name} for {num_rows} rows")
        _check(bool(np.isfinite(np.array(values, np.float32)).all()), f"{name} that are not finite")
    pair_ids = np.array(message.pair_ids, np.int64)
    if len(pair_ids):
        counts = np.unique(pair_ids, return_counts=True)[1]
        _check(len(pair_ids) == num_rows and bool((counts == 2).all()), "rows that are not in pairs")
        _check(int(pair_ids.max()) < num_rows, f"pair {int(pair_ids.max())} among {num_rows} rows")
    input_ids = np.frombuffer(message.input_ids, "<i4").astype(np.int32)
    smallest_id, largest_id = int(input_ids.min()), int(input_ids.max())
    bad_id = smallest_id if smallest_id < 0 else largest_id
    _check(0 <= bad_id < vocab_size, f"token id {bad_id} outside the vocabulary of {vocab_size}")
    label_mask = np.frombuffer(message.label_mask, np.uint8).copy()
    _check(int(label_mask.max()) <= 1, f"label mask value {int(label_mask.max())} where 0 and 1 are allowed")
    sampled_logps = np.array(message.sampled_logps, np.float32)
    if len(sampled_logps):
        num_labels = int(label_mask.sum())
        _check(
            len(sampled_logps) == num_labels, f"{len(sampled_logps)} log-probabilities for {num_labels} label tokens"
        )
        _check(bool(np.isfinite(sampled_logps).all()), "log-probabilities of sampled tokens that are not finite")
    discount = message.length_discount
    _check(0 <= discount <= 1, f"a length discount of {discount} where 0 to 1 are allowed")
    return MicroBatchRows(
        lengths=lengths.astype(np.int32),
        input_ids=input_ids,
        label_mask=label_mask,
        padded_tokens=padded_tokens,
        sample_indices=tuple(int(index) for index in sample_indices),
        segment_lengths=np.array(message.segment_lengths, np.int32) if message.segment_lengths else None,
        labels=np.array(message.labels, np.float32) if message.labels else None,
        pair_ids=pair_ids.astype(np.int32) if len(pair_ids) else None,
        reference_logps=np.array(message.reference_logps, np.float32) if message.reference_logps else None,
        second_starts=second_starts.astype(np.int32) if len(second_starts) else None,
        advantages=np.array(message.advantages, np.float32) if message.advantages else None,
        sampled_logps=sampled_logps if len(sampled_logps) else None,
        length_discount=message.length_discount,
    )


def _listed(values: NDArray[Any] | None) -> list[Any]:
    return [] if values is None else values.tolist()


def _check_segments(segment_lengths: Sequence[int], row_lengths: NDArray[np.int64]) -> None:
    """Segments are not empty, and a row ends where one of them does."""
    if not segment_lengths:
        return
    segments = np.array(segment_lengths, np.int64)
    _check(int(segments.min()) >= 1, "a segment without tokens")
    ends, row_ends = np.cumsum(segments), np.cumsum(row_lengths)
    is_whole = int(ends[-1]) == int(row_ends[-1]) and bool(np.isin(row_ends, ends).all())
    _check(is_whole, f"{len(segments)} segments that do not end with the rows")


def row_values_to_proto(micro_batch: int, values_BK: NDArray[np.float32]) -> workers_pb2.RowValues:
    """Encode what an objective says of the rows of a micro-batch, [rows, columns]."""
    data = values_BK.astype("<f4", copy=False).tobytes()
    return workers_pb2.RowValues(micro_batch=micro_batch, num_columns=values_BK.shape[1], values=data)


def row_values_from_proto(message: workers_pb2.RowValues, *, num_rows: int) -> NDArray[np.float32]:
    """Decode what an objective says of the rows of a micro-batch, [num_rows, columns].

    Raises:
        FrameError: there are not as many values as rows and columns ask for.
    """
    num_bytes = 4 * num_rows * message.num_columns
    _check(len(message.values) == num_bytes, f"{len(message.values)} bytes of row values instead of {num_bytes}")
    return np.frombuffer(message.values, "<f4").astype(np.float32).reshape(num_rows, message.num_columns)


def _check(holds: bool, what: str) -> None:
    if not holds:
        raise FrameError(f"malformed micro-batch: {what}; coordinator and agents may run different versions of plutino")


def unit_to_proto(unit: Unit) -> workers_pb2.UnitId:
    """Encode a unit's name."""
    return workers_pb2.UnitId(kind=int(unit.kind), serial=unit.serial)


def unit_from_proto(message: workers_pb2.UnitId) -> Unit:
    """Decode a unit's name.

    Raises:
        FrameError: there is no such kind of unit.
    """
    _check(message.kind in set(UnitKind), f"unit kind {message.kind} is unknown")
    return Unit(UnitKind(message.kind), message.serial)


def worker_to_proto(worker: WorkerRef) -> agents_pb2.WorkerId:
    """Encode a worker's name."""
    return agents_pb2.WorkerId(
        job_id=worker.job_id,
        plan_epoch=worker.plan_epoch,
        stage_index=worker.stage_index,
        replica_index=worker.replica_index,
    )


def worker_from_proto(message: agents_pb2.WorkerId) -> WorkerRef:
    """Decode a worker's name."""
    return WorkerRef(JobId(message.job_id), message.plan_epoch, message.stage_index, message.replica_index)
