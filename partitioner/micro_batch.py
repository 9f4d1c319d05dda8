"""How a job's shape and a device's seconds change with the number of rows in a micro-batch.

Entry points: :func:`candidate_rows`, :func:`lightest_shapes`, :func:`with_rows`, :func:`scaled_devices`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from partitioner.activations import has_small_tensors
from partitioner.device import BlockTimings, DeviceProfile
from partitioner.model import ModelTable
from partitioner.shape import JobShape

_BLOCK_FORWARD_OVERHEAD_S = 2.0e-3
_BLOCK_BACKWARD_OVERHEAD_S = 1.8e-3
"""Seconds a block takes however few tokens it gets, where no device has said: dispatching the some hundred operators of
a block with LoRA, from Python forward and by the autograd engine backward. Measured on a 4-token micro-batch with
hidden size 64, where there is next to nothing to compute. Without this share many small micro-batches would always look
best."""

_OVERHEADS_S = {
    "forward_s": _BLOCK_FORWARD_OVERHEAD_S,
    "backward_s": _BLOCK_BACKWARD_OVERHEAD_S,
    "recomputed_backward_s": _BLOCK_FORWARD_OVERHEAD_S + _BLOCK_BACKWARD_OVERHEAD_S,
}

_MAX_OVERHEAD_SHARE = 0.5
"""A faster host has less overhead than the one it was measured on; never more than this share of its own timing."""


def candidate_rows(batch_rows: int, rows_per_sample: int = 1) -> list[int]:
    """Divisors of the batch, largest first, so that all micro-batches are alike and cut no sample."""
    return [rows for rows in range(batch_rows, 0, -1) if batch_rows % rows == 0 and rows % rows_per_sample == 0]


def with_rows(shape: JobShape, rows: int, label_tokens_of: Callable[[int], int] | None = None) -> JobShape:
    """The same job with another micro-batch.

    Args:
        shape: the job.
        rows: rows of the new micro-batch.
        label_tokens_of: rows -> largest number of label tokens in one micro-batch of so many rows. None: bounded from
            the shape's own number, by whole rows of labels where the micro-batch shrinks.
    """
    if label_tokens_of is not None:
        label_tokens = label_tokens_of(rows)
    else:
        num_old = -(-rows // shape.micro_batch_rows)
        label_tokens = min(shape.label_tokens * num_old, rows * shape.row_tokens)
    return shape.model_copy(update={"micro_batch_rows": rows, "label_tokens": label_tokens})


def lightest_shapes(table: ModelTable, shape: JobShape) -> tuple[JobShape, ...]:
    """The job with micro-batches of which one holds the fewest bytes: a job that fits with any fits with one of these.

    Bytes grow with the rows but for one step down, where hidden states come to have mappings of their own.
    """
    fewest_first = [with_rows(shape, rows) for rows in candidate_rows(shape.batch_rows, shape.rows_per_sample)[::-1]]
    mapped = next((one for one in fewest_first if not has_small_tensors(table, one)), fewest_first[0])
    return (fewest_first[0],) if mapped is fewest_first[0] else (fewest_first[0], mapped)


def scaled_devices(devices: Sequence[DeviceProfile], measured_rows: int, rows: int) -> list[DeviceProfile]:
    """Profiles as they would read for a micro-batch of ``rows``, from one of ``measured_rows``.

    Where a device was measured with one row too, its seconds lie on a line between both. Beyond the measured rows they
    are the geometric mean of that line and of what grows with the rows: while reading weights takes longest more rows
    cost next to nothing, and later all that they compute. On one core, ms of 16 rows from 4 and 1: a head of 49,152 x
    576 56 (measured 50, by the rows 105), T5-Base's decoder block 43 (41, 55), its encoder's 188 (173, 192).
    """
    return [device.model_copy(update={"timings": _scaled(device.timings, measured_rows, rows)}) for device in devices]


def _scaled(timings: BlockTimings, measured_rows: int, rows: int) -> BlockTimings:
    known_s, one_row_s = timings.known_s, timings.one_row_s if measured_rows > 1 else {}
    found_s = {name: _by_rows(name, seconds, rows / measured_rows) for name, seconds in known_s.items()}
    for name, seconds in one_row_s.items():
        found_s[name] = _by_line(seconds, known_s[name], measured_rows, rows, by_rows_s=found_s[name])

    def growth(*names: str) -> float:
        return sum(found_s[name] for name in names) / sum(known_s[name] for name in names)

    # What was measured with one number of rows alone grows as what it is a kind of.
    growths = {name: growth(name) for name in one_row_s}
    growths |= {
        f"{part}recomputed_backward_s": growth(f"{part}forward_s", f"{part}backward_s")
        for part in ("", "decoder_")
        if f"{part}forward_s" in one_row_s
    }
    for name in known_s:
        kind = name.removeprefix("mapped_")
        if kind in growths and name not in one_row_s:
            found_s[name] = known_s[name] * growths[kind]
    return BlockTimings(**{**timings.all_s, **found_s})


def _by_rows(name: str, seconds: float, factor: float) -> float:
    """Seconds that grow with the rows, but for a known overhead.

    Embedding and head are a handful of operators each: their overhead is lost in that of the blocks.
    """
    overhead_s = _OVERHEADS_S.get(name.removeprefix("mapped_").removeprefix("decoder_"), 0.0)
    fixed_s = min(overhead_s, _MAX_OVERHEAD_SHARE * seconds)
    return fixed_s + (seconds - fixed_s) * factor


def _by_line(one_row_s: float, measured_s: float, measured_rows: int, rows: int, *, by_rows_s: float) -> float:
    """Seconds on the line through those of one row and of the measured rows; beyond them see :func:`scaled_devices`."""
    # Short passes may come out the other way round.
    slope_s = max(0.0, measured_s - one_row_s) / (measured_rows - 1)
    on_line_s = measured_s + slope_s * (rows - measured_rows)
    return on_line_s if rows <= measured_rows else math.sqrt(on_line_s * by_rows_s)
