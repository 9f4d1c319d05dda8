from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plutino.data.batches import (
    batch_indices,
    cut_micro_batches,
    first_epoch_micro_batches,
    gather_step,
    prompt_micro_batch,
    repeated_micro_batches,
    sample_order,
    sequential_indices,
    steps_per_epoch,
    total_steps,
)
from plutino.data.samples import Samples
from plutino.errors import DataError, NumericsError


def samples_of(*lengths: int, num_labels: int = 1) -> Samples:
    """Rows of the given lengths, the last ``num_labels`` tokens of each carrying loss; row i's ids are 100 * i + t."""
    masks = [[int(t >= n - num_labels) for t in range(n)] for n in lengths]
    return Samples(
        input_ids=np.array([100 * i + t for i, n in enumerate(lengths) for t in range(n)], np.int32),
        label_mask=np.array([m for mask in masks for m in mask], np.uint8),
        starts=np.cumsum([0, *lengths], dtype=np.int64),
        prompt_tokens=np.array([n - num_labels for n in lengths], np.int32),
        line_numbers=np.arange(1, len(lengths) + 1),
        num_truncated=0,
    )


def test_longest_source_is_what_a_sequence_has_without_loss_and_may_be_in_a_shorter_row() -> None:
    rows = samples_of(5, 9, 8)
    rows.label_mask[5:12] = 1

    assert (int(rows.lengths.max()), rows.most_unlabelled, rows.most_labels) == (9, 7, 8)


def test_sample_order_is_the_one_written_down_for_ever() -> None:
    """A job resumed with a newer plutino, Python or numpy must go on in the same order."""
    assert sample_order(10, seed=0, epoch=0).tolist() == [4, 1, 8, 3, 6, 5, 7, 2, 0, 9]


def test_sample_order_differs_by_seed_and_by_epoch() -> None:
    orders = {tuple(sample_order(50, seed, epoch).tolist()) for seed in (0, 1) for epoch in (0, 1)}

    assert len(orders) == 4


@settings(max_examples=60, deadline=None)
@given(num_samples=st.integers(1, 60), batch_size=st.integers(1, 70), seed=st.integers(0, 9))
def test_batch_indices_every_epoch_holds_each_row_exactly_once(num_samples: int, batch_size: int, seed: int) -> None:
    num_steps = steps_per_epoch(num_samples, batch_size)

    for epoch in (0, 1, 2):
        steps = range(epoch * num_steps, (epoch + 1) * num_steps)
        seen = [index for step in steps for index in batch_indices(step, batch_size, num_samples, seed)]
        assert sorted(seen) == list(range(num_samples))


def test_batch_indices_last_batch_of_an_epoch_is_smaller() -> None:
    sizes = [len(batch_indices(step, 4, 10, seed=0)) for step in range(6)]

    assert sizes == [4, 4, 2, 4, 4, 2]


@pytest.mark.parametrize(
    ("epochs", "steps", "expected"),
    [(None, None, 10), (None, 7, 7), (3, None, 30), (1.1, None, 11), (0.05, None, 1), (2.25, None, 23)],
)
def test_total_steps_of_100_rows_by_10(epochs: float | None, steps: int | None, expected: int) -> None:
    assert total_steps(100, 10, epochs=epochs, steps=steps) == expected


def test_sequential_indices_go_through_the_file_and_end() -> None:
    assert [sequential_indices(batch, 4, 6) for batch in range(3)] == [(0, 1, 2, 3), (4, 5), ()]


def test_cut_micro_batches_groups_rows_of_like_length_longest_first() -> None:
    batch = cut_micro_batches(samples_of(3, 9, 3, 8, 2), [2, 4, 1, 0, 3], micro_batch_size=2)

    assert [rows.sample_indices for rows in batch.micro_batches] == [(1, 3), (0, 2), (4,)]
    assert [rows.padded_tokens for rows in batch.micro_batches] == [9, 3, 2]
    assert [rows.lengths.tolist() for rows in batch.micro_batches] == [[9, 8], [3, 3], [2]]


def test_cut_micro_batches_does_not_depend_on_the_order_of_the_batch() -> None:
    samples = samples_of(3, 3, 4, 2)

    forward = cut_micro_batches(samples, [0, 1, 2, 3], 2)
    backward = cut_micro_batches(samples, [3, 2, 1, 0], 2)

    assert [m.sample_indices for m in forward.micro_batches] == [m.sample_indices for m in backward.micro_batches]


def test_cut_micro_batches_concatenates_ids_and_masks_of_its_rows() -> None:
    (rows,) = cut_micro_batches(samples_of(2, 3), [0, 1], micro_batch_size=4).micro_batches

    assert rows.input_ids.tolist() == [100, 101, 102, 0, 1]
    assert rows.label_mask.tolist() == [0, 0, 1, 0, 1]
    assert (rows.input_ids.dtype, rows.label_mask.dtype, rows.lengths.dtype) == (np.int32, np.uint8, np.int32)


def test_cut_micro_batches_loss_weight_counts_labels_after_the_shift_over_the_whole_batch() -> None:
    everything_labelled = samples_of(3, 2, 4, num_labels=9)

    batch = cut_micro_batches(everything_labelled, [0, 1, 2], micro_batch_size=1)

    assert batch.loss_weight == 2 + 1 + 3


def test_cut_micro_batches_without_a_label_names_the_lines() -> None:
    with pytest.raises(NumericsError, match=r"batch of 2 rows has no label token \(lines 2, 3\)"):
        cut_micro_batches(samples_of(4, 3, 2, num_labels=0), [2, 1], micro_batch_size=2)


def test_prompt_micro_batch_holds_prompts_in_the_order_given() -> None:
    rows = prompt_micro_batch(samples_of(3, 5), [1, 0])

    assert rows.input_ids.tolist() == [100, 101, 102, 103, 0, 1]
    assert rows.lengths.tolist() == [4, 2]
    assert (rows.padded_tokens, rows.sample_indices, rows.label_mask.any()) == (4, (1, 0), False)


def test_prompt_micro_batch_prompt_without_tokens_is_refused_by_line() -> None:
    with pytest.raises(DataError, match=r"line 2: the prompt has no token"):
        prompt_micro_batch(samples_of(3, 1), [0, 1])


@pytest.mark.parametrize("cut", ["rows", "tokens"])
@pytest.mark.parametrize(
    ("num_rows", "batch_size", "micro_batch_size"), [(12, 5, 2), (13, 4, 4), (7, 16, 3), (20, 4, 8)]
)
def test_repeated_micro_batches_are_those_of_the_first_epoch_in_other_steps(
    num_rows, batch_size, micro_batch_size, cut
):
    samples = samples_of(*(3 + row % 5 for row in range(num_rows)))
    num_steps = steps_per_epoch(num_rows, batch_size)
    first_epoch = first_epoch_micro_batches(samples, batch_size, micro_batch_size, 3, cut)
    epochs = [
        [
            repeated_micro_batches(first_epoch, epoch * num_steps + step, batch_size, micro_batch_size, 3)
            for step in range(num_steps)
        ]
        for epoch in range(3)
    ]

    for step, rows in enumerate(epochs[0]):
        indices = batch_indices(step, batch_size, num_rows, 3)
        expected = cut_micro_batches(samples, indices, micro_batch_size, cut=cut)
        found = gather_step(samples, rows)
        assert [m.sample_indices for m in found.micro_batches] == [m.sample_indices for m in expected.micro_batches]
        assert found.loss_weight == expected.loss_weight
    for steps in epochs:
        assert all(steps)
        micro_batches = [rows for step in steps for rows in step]
        assert sorted(micro_batches) == sorted(first_epoch)
        assert sorted(row for rows in micro_batches for row in rows) == list(range(num_rows))
    if len(first_epoch) > 3:
        assert epochs[1] != epochs[2] != epochs[0]
