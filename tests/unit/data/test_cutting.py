"""Micro-batches of like tokens: whole, in order, within what memory was planned for, and as small as can be."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plutino.data.cutting import CutRow, cut_by_rows, cut_by_tokens, spare_labels

ROWS = st.lists(st.tuples(st.integers(1, 60), st.integers(0, 60)), min_size=1, max_size=24).map(
    lambda sizes: [CutRow(index, tokens, min(tokens, labels)) for index, (tokens, labels) in enumerate(sizes)]
)


def rows_of(*lengths):
    return [CutRow(index, length, 1) for index, length in enumerate(lengths)]


def padded_tokens(cut, rows):
    return [len(group) * max(rows[index].num_tokens for index in group) for group in cut]


def padded_labels(cut, rows):
    return [len(group) * max(rows[index].num_labels for index in group) for group in cut]


def test_longest_rows_get_company_of_fewer():
    rows = rows_of(80, 40, 40, 40, 40, 20, 20, 20)

    cut = cut_by_tokens(rows, 2)

    assert padded_tokens(cut_by_rows(rows, 2), rows) == [160, 80, 80, 40]
    assert cut == ((0,), (1, 2), (3, 4), (5, 6, 7))
    assert padded_tokens(cut, rows) == [80, 80, 80, 60]


def test_equal_rows_are_cut_as_by_rows():
    rows = rows_of(*[7] * 10)

    assert cut_by_tokens(rows, 4) == (*cut_by_rows(rows, 4)[:2], (8, 9))


def test_rows_with_many_label_tokens_bound_a_micro_batch_too():
    """Logits of short rows that are all label may take more memory than the longest row's."""
    rows = [CutRow(0, 100, 2), *(CutRow(index, 10, 10) for index in range(1, 8))]

    assert padded_labels(cut_by_tokens(rows, 4), rows) == [30, 50]
    assert spare_labels(40) == 16
    assert spare_labels(4 * 3) == 12


@given(ROWS, st.integers(1, 8))
def test_every_row_is_in_one_of_as_many_micro_batches_none_larger_than_by_rows(rows, size):
    cut, by_rows = cut_by_tokens(rows, size), cut_by_rows(rows, size)

    assert sorted(itertools.chain(*cut)) == list(range(len(rows)))
    assert len(cut) == len(by_rows)
    assert all(cut)
    assert max(padded_tokens(cut, rows)) <= max(padded_tokens(by_rows, rows))
    most_labels = size * max(row.num_labels for row in rows)
    assert max(padded_labels(cut, rows)) <= most_labels + spare_labels(most_labels)
    assert max(map(len, cut)) <= 2 * size
    lengths = [rows[index].num_tokens for index in itertools.chain(*cut)]
    assert lengths == sorted(lengths, reverse=True)


@given(ROWS.filter(lambda rows: len(rows) <= 9), st.integers(1, 4))
def test_no_cut_of_the_sorted_rows_has_a_smaller_largest_micro_batch(rows, size):
    number = len(cut_by_rows(rows, size))
    order = [index for group in cut_by_rows(rows, 1) for index in group]
    cuts = (
        [order[start:end] for start, end in itertools.pairwise((0, *borders, len(order)))]
        for borders in itertools.combinations(range(1, len(order)), number - 1)
    )
    most_labels = size * max(row.num_labels for row in rows)
    most_labels += spare_labels(most_labels)
    allowed = [cut for cut in cuts if max(padded_labels(cut, rows)) <= most_labels and max(map(len, cut)) <= 2 * size]

    assert max(padded_tokens(cut_by_tokens(rows, size), rows)) == min(max(padded_tokens(cut, rows)) for cut in allowed)


@pytest.mark.parametrize("cut", [cut_by_rows, cut_by_tokens])
def test_order_of_the_rows_does_not_matter(cut):
    rows = rows_of(5, 9, 9, 3, 7, 1)

    assert cut(rows, 2) == cut(rows[::-1], 2)
    assert cut([], 2) == ()
