"""How good the values are that a score head or a preference objective gives: pure comparisons of numbers.

Entry point: :func:`score_values`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from coordinator.jobs.scoring import RowVerdict, Score
from plutino.job.objective_part import MetricName

Floats = NDArray[np.float64]


def score_values(metric: MetricName, values: Sequence[Sequence[float]], labels: Sequence[float]) -> Score:
    """Compare what the objective said of rows with their labels.

    Args:
        metric: classes, correlation, pairs or ratings.
        values: of each row: logits of the classes; a prediction; the values of chosen and rejected answer; a reward.
        labels: class numbers, numbers or ratings; not looked at for pairs.

    Raises:
        ValueError: there are no rows, or the two differ in number.
    """
    if not values or (metric != "pairs" and len(values) != len(labels)):
        raise ValueError(f"{len(values)} rows of values for {len(labels)} labels")
    given, true = np.array(values, np.float64), np.array(labels, np.float64)
    num_rows = len(given)
    if metric == "classes":
        chosen = given.argmax(axis=1)
        return Score(
            metric=metric,
            num_rows=num_rows,
            accuracy=float((chosen == true).mean()),
            macro_f1=_macro_f1(chosen.astype(np.int64), true.astype(np.int64)),
        )
    if metric == "correlation":
        predicted = given[:, 0]
        return Score(
            metric=metric,
            num_rows=num_rows,
            pearson=_correlation(predicted, true),
            spearman=_correlation(_ranks(predicted), _ranks(true)),
            mse=float(((predicted - true) ** 2).mean()),
        )
    if metric == "pairs":
        margins = given[:, 0] - given[:, 1]
        # A tie prefers neither.
        right = float(((margins > 0) + 0.5 * (margins == 0)).mean())
        return Score(metric=metric, num_rows=num_rows, pair_accuracy=right, margin=float(margins.mean()))
    assert metric == "ratings", f"{metric} is not made of values"
    return Score(
        metric=metric,
        num_rows=num_rows,
        auc=_auc(given[:, 0], true),
        spearman=_correlation(_ranks(given[:, 0]), _ranks(true)),
    )


def class_verdicts(
    values: Mapping[int, Sequence[float]], labels: Mapping[int, float], class_names: Sequence[str]
) -> tuple[RowVerdict, ...]:
    """Whether each row's largest logit is that of its class."""
    chosen = {row: int(np.argmax(logits)) for row, logits in values.items()}
    return tuple(
        RowVerdict(row=row, is_right=chosen[row] == labels[row], answer=class_names[chosen[row]])
        for row in sorted(values)
    )


def _macro_f1(chosen: NDArray[np.int64], true: NDArray[np.int64]) -> float:
    """Mean F1 of all classes that occur, in the truth or in the answers."""
    scores = []
    for one in np.union1d(chosen, true):
        num_right = int(((chosen == one) & (true == one)).sum())
        scores.append(2 * num_right / int((chosen == one).sum() + (true == one).sum()))
    return float(np.mean(scores))


def _correlation(left: Floats, right: Floats) -> float:
    """Pearson's; 0 where one side does not vary, so that nothing can be said."""
    left, right = left - left.mean(), right - right.mean()
    spread = math.sqrt(float((left**2).sum()) * float((right**2).sum()))
    return float((left * right).sum()) / spread if spread else 0.0


def _ranks(values: Floats) -> Floats:
    """Ranks from 1; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: Floats = ((last - counts + 1 + last) / 2)[inverse]
    return ranks


def _auc(rewards: Floats, ratings: Floats) -> float | None:
    """How often a better answer has the higher reward, over all pairs of one above and one below the middle rating.

    None where all ratings are on one side.
    """
    is_good = ratings > (ratings.max() + ratings.min()) / 2
    num_good, num_bad = int(is_good.sum()), int((~is_good).sum())
    if not num_good or not num_bad:
        return None
    rank_sum = float(_ranks(rewards)[is_good].sum())
    return (rank_sum - num_good * (num_good + 1) / 2) / (num_good * num_bad)
