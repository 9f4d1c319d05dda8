"""Scores of values, worked out by hand."""

from __future__ import annotations

import pytest

from coordinator.jobs.value_scores import score_values


def test_classes_accuracy_and_macro_f1_count_every_class_alike():
    logits = [[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [0.5, 0.1, 0.2], [0.0, 1.0, 0.9]]

    score = score_values("classes", logits, [0, 1, 1, 2])

    assert score.accuracy == 0.5
    # Class 0: one right, one too many (F1 2/3); class 1: one right of two, one too many (1/2); class 2: none.
    assert score.macro_f1 == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)


def test_correlation_of_a_rising_curve_is_one_in_ranks_alone():
    score = score_values("correlation", [[1.0], [4.0], [9.0], [16.0]], [1, 2, 3, 4])

    assert score.spearman == pytest.approx(1.0)
    assert score.pearson == pytest.approx(0.9843740386976972)
    assert score.mse == pytest.approx((0 + 4 + 36 + 144) / 4)


def test_correlation_with_ties_shares_their_ranks():
    # Ranks 1.5, 1.5, 3, 4 against 1, 2, 3, 4.
    assert score_values("correlation", [[5.0], [5.0], [6.0], [7.0]], [1, 2, 3, 4]).spearman == pytest.approx(
        0.9486832980505138
    )


def test_correlation_of_a_constant_says_nothing():
    score = score_values("correlation", [[2.0], [2.0]], [0, 1])

    assert (score.pearson, score.spearman) == (0.0, 0.0)


def test_pairs_count_a_tie_as_half():
    score = score_values("pairs", [[1.0, 0.0], [0.0, 2.0], [3.0, 3.0], [1.0, 0.5]], [])

    assert score.pair_accuracy == pytest.approx((1 + 0 + 0.5 + 1) / 4)
    assert score.margin == pytest.approx((1 - 2 + 0 + 0.5) / 4)


def test_ratings_auc_is_the_share_of_pairs_in_the_right_order():
    # Good: 0.9, 0.4, 0.4; bad: 0.4, 0.1. Two of the six pairs are ties, which count half.
    score = score_values("ratings", [[0.9], [0.4], [0.4], [0.4], [0.1]], [1, 1, 1, 0, 0])

    assert score.auc == pytest.approx((1 + 1 + 0.5 + 1 + 0.5 + 1) / 6)


def test_ratings_of_one_kind_have_no_auc():
    assert score_values("ratings", [[0.9], [0.4]], [1, 1]).auc is None


@pytest.mark.parametrize("metric", ["classes", "correlation", "ratings"])
def test_rows_and_labels_that_differ_in_number_are_refused(metric):
    with pytest.raises(ValueError, match="1 rows of values for 2 labels"):
        score_values(metric, [[0.5]], [0, 1])
    with pytest.raises(ValueError, match="0 rows"):
        score_values(metric, [], [])
