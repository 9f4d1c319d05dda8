"""Which trials of a sweep go on, and which one to take: pure functions of results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from plutino.sweep import Halving, Recommendation, TrialResult


@dataclass(frozen=True, slots=True)
class Rung:
    """One round of a sweep."""

    num_trials: int
    steps: int | None
    """Of each of its jobs; None: as many as the trial asks for."""


def plan_rungs(num_trials: int, total_steps: int | None, halving: Halving | None) -> tuple[Rung, ...]:
    """Rounds with fewer trials and more steps each, the last one with all steps.

    Every round's jobs begin anew: their learning rate falls to its end within their own steps, so that each is a fair,
    short training, and the result of the last round is that of an ordinary job.
    """
    if halving is None or total_steps is None:
        return (Rung(num_trials, None),)
    rungs = [Rung(max(1, num_trials), None)]
    counts = [num_trials]
    while counts[-1] > 1 and total_steps // halving.eta ** len(counts) >= halving.min_steps:
        counts.append(max(1, counts[-1] // halving.eta))
    rungs = [
        Rung(count, None if (left := len(counts) - 1 - index) == 0 else total_steps // halving.eta**left)
        for index, count in enumerate(counts)
    ]
    return tuple(rungs)


def ranked(results: Sequence[TrialResult]) -> list[TrialResult]:
    """Measured trials, the best first; of equal scores, which short trainings often have, the lower loss counts."""
    measured = [result for result in results if result.is_measured]
    return sorted(measured, key=lambda r: (-(r.score or 0.0), _loss(r), r.trained_params, r.trial))


def recommend(results: Sequence[TrialResult]) -> Recommendation | None:
    """The smallest of the trials that cannot be told from the best; None if none was measured.

    Scores are shares of n rows, so two of them that differ by less than the best one's standard error,
    ``sqrt(q (1 - q) / n)``, are one to this sweep. Losses have no such yardstick: the lowest one wins.
    """
    order = ranked(results)
    if not order:
        return None
    best = order[0]
    if not best.score:
        unscored = "" if best.score is None else "no trial has a row right; "
        others = f", the next one has {_loss(order[1]):.4f}" if len(order) > 1 else ""
        return Recommendation(
            trial=best.trial, reason=f"{unscored}it has the lowest held-out loss, {_loss(best):.4f}{others}"
        )
    error = math.sqrt(best.score * (1 - best.score) / best.num_scored) if best.num_scored else 0.0
    equal = [result for result in order if result.score is not None and best.score - result.score <= error]
    chosen = min(equal, key=lambda r: (r.trained_params, -(r.score or 0.0), r.trial))
    if chosen.trial == best.trial:
        if len(equal) > 1:
            return Recommendation(
                trial=best.trial,
                reason=f"it has the highest score, {best.score:.1%}, and trains the fewest parameters of the "
                f"{len(equal)} trials within its standard error of {error:.1%} on {best.num_scored} rows",
            )
        others = f"; the next one has {order[1].score:.1%}" if len(order) > 1 else ""
        return Recommendation(
            trial=best.trial,
            reason=f"its score of {best.score:.1%} on {best.num_scored} rows is the highest, by more than its "
            f"standard error of {error:.1%}{others}",
        )
    return Recommendation(
        trial=chosen.trial,
        reason=f"its score of {chosen.score:.1%} cannot be told from the highest, {best.score:.1%} of trial "
        f"{best.trial + 1} (standard error {error:.1%} on {best.num_scored} rows), and it trains "
        f"{chosen.trained_params} parameters instead of {best.trained_params}",
    )


def _loss(result: TrialResult) -> float:
    return math.inf if result.eval_loss is None else result.eval_loss
