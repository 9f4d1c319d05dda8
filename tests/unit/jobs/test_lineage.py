from __future__ import annotations

import pytest

from coordinator.jobs.lineage import (
    BestSoFar,
    EvaluationRow,
    LedgerRow,
    LedgerStatus,
    exactly_once_violations,
    judge_evaluations,
    next_step,
    samples_on_lineage,
    undo,
)
from plutino.errors import JobError


def row(step: int, *samples: int, plan_epoch: int = 1, status: LedgerStatus = LedgerStatus.COMMITTED) -> LedgerRow:
    return LedgerRow(step=step, plan_epoch=plan_epoch, status=status, sample_indices=samples)


def evaluations(*losses: float) -> list[EvaluationRow]:
    return [EvaluationRow(step=10 * position, loss=loss) for position, loss in enumerate(losses, start=1)]


def test_undo_marks_rows_from_the_step_on_and_a_later_epoch_feeds_them_again() -> None:
    rows = undo([row(0, 5, 6), row(1, 7, 8), row(2, 9)], 1, "pi-3 left")
    again = (*rows, row(1, 7, 8, plan_epoch=2))

    assert [each.status.value for each in rows] == ["committed", "undone", "undone"]
    assert next_step(rows) == 1
    assert samples_on_lineage(again) == (5, 6, 7, 8)


def test_undo_twice_keeps_the_first_reason() -> None:
    rows = undo(undo([row(0, 1)], 0, "first"), 0, "second")

    assert rows[0].reason == "first"


def test_samples_on_lineage_counts_skipped_steps() -> None:
    assert samples_on_lineage([row(0, 1), row(1, 2, status=LedgerStatus.SKIPPED)]) == (1, 2)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([row(0), row(2)], "no row for step 1, but one for step 2"),
        ([row(0), row(0, plan_epoch=2)], "holds step 0 twice: in plan epochs 1 and 2"),
    ],
)
def test_next_step_of_broken_ledger_is_refused(rows: list[LedgerRow], said: str) -> None:
    with pytest.raises(JobError, match=said):
        next_step(rows)


def test_exactly_once_violations_name_lost_and_repeated_samples() -> None:
    violations = exactly_once_violations([row(0, 0, 1), row(1, 1)], expected=[0, 1, 2])

    assert violations == ("sample 1 was fed 2 times instead of 1", "sample 2 was fed 0 times instead of 1")


def test_judge_evaluations_of_none_has_no_best() -> None:
    assert judge_evaluations([]) == BestSoFar()


def test_judge_evaluations_counts_those_without_progress() -> None:
    assert judge_evaluations(evaluations(3.0, 2.0, 2.5, 2.0)) == BestSoFar(step=20, loss=2.0, evaluations_since=2)


def test_judge_evaluations_small_fall_is_best_but_no_progress() -> None:
    verdict = judge_evaluations(evaluations(3.0, 2.95), min_delta=0.1)

    assert verdict == BestSoFar(step=20, loss=2.95, evaluations_since=1)


def test_judge_evaluations_small_falls_add_up_to_progress() -> None:
    assert judge_evaluations(evaluations(3.0, 2.94, 2.88), min_delta=0.1).evaluations_since == 0
