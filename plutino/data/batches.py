"""Which rows a step learns from, in which order, and how they are cut into micro-batches.

Pure functions of their arguments: every process, and every restart, gets the same batches. Entry points:
:func:`total_steps`, :func:`batch_indices` and :func:`cut_micro_batches` for training, :func:`sequential_indices` for
held-out rows, :func:`prompt_micro_batch` for generation.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from plutino.data.cutting import CutRow, cut_by_rows, cut_by_tokens
from plutino.data.readers import name_lines
from plutino.data.samples import Batchable, TokenRow
from plutino.errors import DataError, NumericsError
from plutino.job.objective_part import LENGTH_DISCOUNTS, Counted
from plutino.types import MicroBatchCut


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MicroBatchRows:
    """Rows that go through the pipeline together, without padding."""

    lengths: NDArray[np.int32]
    """[num_rows], tokens of each row."""
    input_ids: NDArray[np.int32]
    """[sum of lengths], rows one after the other."""
    label_mask: NDArray[np.uint8]
    """[sum of lengths], 1 where the token carries loss as a label. A row's first token never does."""
    padded_tokens: int
    """The stages pad every row to this many tokens: the longest row's length."""
    sample_indices: tuple[int, ...]
    """Positions in the data set: [num_rows], or one for both rows of a pair."""
    segment_lengths: NDArray[np.int32] | None = None
    """Of packed rows: tokens of each segment, row by row. None: every row is one sequence."""
    labels: NDArray[np.float32] | None = None
    """[num_rows], class index, number or rating of each row; None where the objective has none."""
    second_starts: NDArray[np.int32] | None = None
    """[num_rows], tokens before the second of two texts, all of them where there is one; None: nobody tells them
    apart."""
    pair_ids: NDArray[np.int32] | None = None
    """[num_rows], the same number for both rows of a preference pair, the chosen one first."""
    reference_logps: NDArray[np.float32] | None = None
    """[num_rows], log-probability of each row's label tokens under the reference, where the data set knows it."""
    advantages: NDArray[np.float32] | None = None
    """[num_rows], how much better each sampled answer is than the others of its group; None: rows are not sampled."""
    sampled_logps: NDArray[np.float32] | None = None
    """[label tokens], log-probability of each when its row was sampled; None: as it is now."""
    length_discount: float = 0.0
    """A label token counts by n ** -length_discount, n being the number of them in its row (in its segment, where rows
    are packed): 1 lets every row weigh the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBatch:
    """One step's (or one evaluation's) rows, cut."""

    micro_batches: tuple[MicroBatchRows, ...]
    loss_weight: float
    """What the loss is divided by, over all micro-batches: label tokens after the shift, rows that have some (each
    segment of packed rows is one) or their weights, or rows."""


def steps_per_epoch(num_samples: int, batch_size: int) -> int:
    """Number of batches that hold every row once; the last may be smaller."""
    return math.ceil(num_samples / batch_size)


def total_steps(num_samples: int, batch_size: int, *, epochs: float | None = None, steps: int | None = None) -> int:
    """Length of the training in optimiser steps: ``steps`` if given, else of so many epochs (1 by default)."""
    if steps is not None:
        return steps
    # The decimal that was written, not the float: 1.1 epochs of 10 steps are 11 steps, not 12.
    exact = Fraction(repr(1.0 if epochs is None else float(epochs)))
    return math.ceil(exact * steps_per_epoch(num_samples, batch_size))


@functools.lru_cache(maxsize=32)
def sample_order(num_samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Order of the rows in an epoch: a permutation of range(num_samples), read-only.

    Rows are sorted by keys from SHAKE-256 rather than drawn from a library's generator, whose stream may change with
    its version; ties (one in 2**64 pairs) fall back to the row's position.
    """
    digest = hashlib.shake_256(f"plutino sample order, seed {seed}, epoch {epoch}".encode()).digest(8 * num_samples)
    order = np.argsort(np.frombuffer(digest, dtype="<u8"), kind="stable").astype(np.int64)
    order.flags.writeable = False
    return order


def batch_indices(step: int, batch_size: int, num_samples: int, seed: int) -> tuple[int, ...]:
    """Positions in the data set of a step's rows, in the epoch's order.

    Steps count on over epochs. Every epoch holds each row exactly once, so its last batch may be smaller.
    """
    epoch, batch = divmod(step, steps_per_epoch(num_samples, batch_size))
    order = sample_order(num_samples, seed, epoch)
    return tuple(order[batch * batch_size : (batch + 1) * batch_size].tolist())


def first_epoch_micro_batches(
    samples: Batchable, batch_size: int, micro_batch_size: int, seed: int, cut: MicroBatchCut = "rows"
) -> tuple[tuple[int, ...], ...]:
    """Rows of every micro-batch of the first epoch, step by step, for jobs whose later epochs repeat them."""
    num_steps = steps_per_epoch(len(samples), batch_size)
    return tuple(
        rows
        for step in range(num_steps)
        for rows in _cut(samples, batch_indices(step, batch_size, len(samples), seed), micro_batch_size, cut)
    )


def repeated_micro_batches(
    first_epoch: Sequence[tuple[int, ...]], step: int, batch_size: int, micro_batch_size: int, seed: int
) -> tuple[tuple[int, ...], ...]:
    """Rows of a step's micro-batches where later epochs repeat those of the first one, in another order.

    What is computed of a micro-batch with the same rows and the same padding has the same bits. A step has as many
    micro-batches as in the first epoch, so that every epoch has as many steps and holds every row once. A micro-batch
    keeps its place within a step and only comes in another step: whoever runs a place of every step needs nobody else's
    entries of the activation cache, and as the longest rows come first, all steps take about as long.
    """
    num_per_step = math.ceil(batch_size / micro_batch_size)
    epoch, batch = divmod(step, math.ceil(len(first_epoch) / num_per_step))
    if epoch == 0:
        return tuple(first_epoch[batch * num_per_step : (batch + 1) * num_per_step])
    chosen: list[tuple[int, ...]] = []
    for place in range(num_per_step):
        of_place = first_epoch[place::num_per_step]
        if batch < len(of_place):  # the last step of an epoch may have fewer
            order = sample_order(len(of_place), seed, epoch * num_per_step + place)
            chosen.append(of_place[int(order[batch])])
    return tuple(chosen)


def sequential_indices(batch: int, batch_size: int, num_samples: int) -> tuple[int, ...]:
    """Positions of the rows of batch ``batch`` of a held-out set, in file order; empty past its end."""
    return tuple(range(batch * batch_size, min((batch + 1) * batch_size, num_samples)))


def cut_micro_batches(
    samples: Batchable,
    indices: Sequence[int],
    micro_batch_size: int,
    counted: Counted | None = None,
    cut: MicroBatchCut = "rows",
) -> StepBatch:
    """Cut a step's rows into micro-batches of ``micro_batch_size`` rows (the last may be smaller), or by tokens.

    Rows are sorted by length first, so that rows of like length share a micro-batch and little is padded. The longest
    come first: a step that does not fit into memory fails at its first micro-batch.

    Args:
        samples: what the rows are taken from.
        indices: positions of the rows.
        micro_batch_size: samples of a micro-batch.
        counted: what the loss is the mean over; None: what it is of these samples.
        cut: by equal numbers of rows, or by like numbers of tokens; see :mod:`plutino.data.cutting`.

    Raises:
        NumericsError: no row has a label token, so that there is no loss to divide.
    """
    return gather_step(samples, _cut(samples, indices, micro_batch_size, cut), counted)


def gather_step(
    samples: Batchable, micro_batches: Sequence[Sequence[int]], counted: Counted | None = None
) -> StepBatch:
    """A step of these micro-batches, each given by its rows; see :func:`cut_micro_batches`.

    Raises:
        NumericsError: no row has a label token, so that there is no loss to divide.
    """
    order = [index for rows in micro_batches for index in rows]
    counted = counted or samples.counted
    loss_weight = sum(samples.loss_weight(index, counted) for index in order)
    if loss_weight == 0:
        where = name_lines(sorted(int(samples.line_numbers[index]) for index in order)) if order else "no rows"
        raise NumericsError(
            f"a batch of {len(order)} rows has no label token ({where}), so its loss is 0 / 0; "
            "raise data.max_tokens, or remove these rows"
        )
    discount = LENGTH_DISCOUNTS.get(counted, 0.0)
    return StepBatch(
        micro_batches=tuple(_gather(samples, rows, discount) for rows in micro_batches), loss_weight=loss_weight
    )


def _cut(
    samples: Batchable, indices: Sequence[int], micro_batch_size: int, cut: MicroBatchCut
) -> tuple[tuple[int, ...], ...]:
    # Once: they are those of the whole data set.
    lengths = samples.lengths
    if cut == "rows":
        return cut_by_rows([CutRow(index, int(lengths[index])) for index in indices], micro_batch_size)
    rows = [CutRow(index, int(lengths[index]), int(samples.loss_weight(index, "label tokens"))) for index in indices]
    return cut_by_tokens(rows, micro_batch_size)


def prompt_micro_batch(samples: Batchable, indices: Sequence[int]) -> MicroBatchRows:
    """The prompts of these rows, in the order given, for generation; no token carries loss.

    Raises:
        DataError: a prompt has no token to start from (it merged with the answer's first token).
    """
    prompts = [samples.prompt(index) for index in indices]
    empty = [int(samples.line_numbers[i]) for i, prompt in zip(indices, prompts, strict=True) if not len(prompt)]
    if empty:
        raise DataError(f"{name_lines(empty)}: the prompt has no token of its own to generate from; lengthen it")
    input_ids = np.concatenate(prompts)
    return MicroBatchRows(
        lengths=np.array([len(prompt) for prompt in prompts], np.int32),
        input_ids=input_ids,
        label_mask=np.zeros(len(input_ids), np.uint8),
        padded_tokens=max(len(prompt) for prompt in prompts),
        sample_indices=tuple(int(index) for index in indices),
    )


def _gather(samples: Batchable, indices: Sequence[int], length_discount: float) -> MicroBatchRows:
    rows = [row for index in indices for row in samples.rows(index)]
    segments = [length for row in rows for length in row.segment_lengths]
    num_pairs = len(indices) if samples.sequences_per_sample == 2 else 0
    return MicroBatchRows(
        lengths=np.array([len(row.ids) for row in rows], np.int32),
        input_ids=np.concatenate([row.ids for row in rows]),
        label_mask=np.concatenate([row.mask for row in rows]),
        padded_tokens=max(len(row.ids) for row in rows),
        sample_indices=tuple(int(index) for index in indices),
        segment_lengths=np.array(segments, np.int32) if segments else None,
        labels=_values(rows, "label"),
        second_starts=None if rows[0].second_start is None else np.array([row.second_start for row in rows], np.int32),
        pair_ids=np.repeat(np.arange(num_pairs, dtype=np.int32), 2) if num_pairs else None,
        reference_logps=_values(rows, "reference_logp"),
        length_discount=length_discount,
    )


def _values(rows: Sequence[TokenRow], name: str) -> NDArray[np.float32] | None:
    values = [getattr(row, name) for row in rows]
    return None if None in values else np.array(values, np.float32)
