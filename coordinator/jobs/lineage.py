"""What became of a job's steps: the ledger, and which of its rows survive.

A recovery that returns to step R undoes the rows from R on; their samples are fed again under a higher plan epoch. The
rows that are not undone are the surviving lineage, and exactly-once is a statement about them alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from plutino.errors import JobError


class LedgerStatus(str, Enum):
    """What became of one step."""

    COMMITTED = "committed"
    SKIPPED = "skipped"
    """Its gradients were dropped on every worker alike; its samples count as fed."""
    UNDONE = "undone"
    """A worker's loss took its effect away; a later row feeds the same samples again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerRow:
    """One decided step of a job."""

    step: int
    """Counted from 0, skipped steps included."""
    plan_epoch: int
    status: LedgerStatus
    sample_indices: tuple[int, ...]
    """Positions of the step's rows in the data set, in the order they were fed."""
    loss: float | None = None
    """Mean loss of the step's label tokens; None for a skipped step."""
    grad_norm: float | None = None
    """Global norm before clipping; None for a skipped step."""
    clip_scale: float | None = None
    """What the commit multiplied the gradients by. A restarted coordinator repeats the commit with this very number.
    None for a skipped step."""
    lr: float | None = None
    reason: str = ""
    """Why the step was skipped or undone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRow:
    """One measured evaluation loss."""

    step: int
    """Number of steps done when it was measured."""
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BestSoFar:
    """The verdict over a job's evaluations."""

    step: int | None = None
    """Number of steps done at the lowest loss, the first of equals; None before the first evaluation."""
    loss: float | None = None
    evaluations_since: int = 0
    """Evaluations in a row without a fall that counts, for early stopping."""


def surviving(rows: Iterable[LedgerRow]) -> tuple[LedgerRow, ...]:
    """The rows that are not undone, in the order of steps.

    Raises:
        JobError: the rows have a gap, or two of them claim the same step.
    """
    lineage = tuple(
        sorted(
            (row for row in rows if row.status is not LedgerStatus.UNDONE), key=lambda row: (row.step, row.plan_epoch)
        )
    )
    for position, row in enumerate(lineage):
        if row.step > position:
            raise JobError(f"the ledger has no row for step {position}, but one for step {row.step}")
        if row.step < position:
            raise JobError(
                f"the ledger holds step {row.step} twice: in plan epochs {lineage[position - 1].plan_epoch} "
                f"and {row.plan_epoch}"
            )
    return lineage


def next_step(rows: Iterable[LedgerRow]) -> int:
    """The first step that is neither committed nor skipped.

    Raises:
        JobError: as :func:`surviving`.
    """
    return len(surviving(rows))


def undo(rows: Iterable[LedgerRow], step: int, reason: str) -> tuple[LedgerRow, ...]:
    """The rows with every one of ``step`` or later undone; order and number of rows stay."""
    return tuple(
        replace(row, status=LedgerStatus.UNDONE, reason=reason)
        if row.step >= step and row.status is not LedgerStatus.UNDONE
        else row
        for row in rows
    )


def samples_on_lineage(rows: Iterable[LedgerRow]) -> tuple[int, ...]:
    """Positions of all samples that the surviving lineage has fed, in order.

    Raises:
        JobError: as :func:`surviving`.
    """
    return tuple(index for row in surviving(rows) for index in row.sample_indices)


def exactly_once_violations(rows: Iterable[LedgerRow], expected: Iterable[int]) -> tuple[str, ...]:
    """How the fed samples differ from the expected ones (with repeats: a data set times its epochs); empty if not.

    Raises:
        JobError: as :func:`surviving`.
    """
    fed, wanted = Counter(samples_on_lineage(rows)), Counter(expected)
    return tuple(
        f"sample {index} was fed {fed[index]} times instead of {wanted[index]}"
        for index in sorted(fed.keys() | wanted.keys())
        if fed[index] != wanted[index]
    )


def judge_evaluations(evaluations: Sequence[EvaluationRow], *, min_delta: float = 0.0) -> BestSoFar:
    """The best evaluation, and how many in a row brought no progress.

    The lowest loss is the best, by however little. A fall counts as progress once it passes ``min_delta`` below the
    loss at the last progress, so that many small falls add up.
    """
    best: EvaluationRow | None = None
    reference: float | None = None
    since = 0
    for row in sorted(evaluations, key=lambda row: row.step):
        if best is None or row.loss < best.loss:
            best = row
        if reference is None or reference - row.loss > min_delta:
            reference, since = row.loss, 0
        else:
            since += 1
    return BestSoFar(step=best.step if best else None, loss=best.loss if best else None, evaluations_since=since)
