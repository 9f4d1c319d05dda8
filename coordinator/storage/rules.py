"""What a write may not contradict, for every store alike. Each rule raises StoreError and changes nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass

from coordinator.jobs.lineage import LedgerStatus
from coordinator.jobs.record import JobRecord, JobState
from coordinator.jobs.recovery import Shadow
from coordinator.storage.base import Change
from plutino.errors import StoreError, UnknownJobError
from plutino.types import JobId


@dataclass(frozen=True, slots=True)
class Position:
    """The part of a stored job that a change must have been decided for."""

    state: JobState
    plan_epoch: int
    next_step: int

    @classmethod
    def of(cls, record: JobRecord) -> Position:
        """Where a record stands."""
        return cls(record.state, record.plan_epoch, record.next_step)

    def __str__(self) -> str:
        return f"{self.state.value} at step {self.next_step}, epoch {self.plan_epoch}"


def check_change(stored: Position, change: Change) -> None:
    """A change must start from what is stored, and keep next step, ledger and plan epoch in step.

    Raises:
        StoreError: it does not.
    """
    before, after, row = change.before, change.after, change.ledger_row
    job_id = after.job_id
    if stored != Position.of(before):
        raise StoreError(
            f"job {job_id}: {change.event} was decided for {Position.of(before)}, but stored is {stored}; "
            "another writer was faster"
        )
    if job_id != before.job_id or after.submitted_at_s != before.submitted_at_s:
        raise StoreError(f"job {before.job_id}: a change may not turn it into {job_id}")
    if after.plan_epoch < before.plan_epoch:
        raise StoreError(f"job {job_id}: plan epoch {before.plan_epoch} cannot fall to {after.plan_epoch}")
    if row is None and after.next_step > before.next_step:
        raise StoreError(f"job {job_id}: next step {after.next_step} needs a ledger row for the one before it")
    if after.next_step < before.next_step and after.plan_epoch == before.plan_epoch:
        raise StoreError(
            f"job {job_id}: steps from {after.next_step} on can be undone only under a new plan epoch, "
            "or late messages of the undone ones would count"
        )
    if row is not None:
        if row.status is LedgerStatus.UNDONE:
            raise StoreError(f"job {job_id}: step {row.step} cannot enter the ledger as undone")
        if (row.step, row.plan_epoch) != (before.next_step, before.plan_epoch) or after.next_step != row.step + 1:
            raise StoreError(
                f"job {job_id}: the row of step {row.step}, epoch {row.plan_epoch} does not take "
                f"{Position.of(before)} to {Position.of(after)}"
            )
    evaluation = change.evaluation
    if evaluation is not None and not math.isfinite(evaluation.loss):
        raise StoreError(f"job {job_id}: the evaluation loss of step {evaluation.step} is {evaluation.loss}")
    _check_reservations(change)


def check_shadow(job_id: JobId, stored: Position, shadow: Shadow) -> None:
    """A shadow must be of the present plan epoch and of a decided step.

    Raises:
        StoreError: it is not.
    """
    if shadow.plan_epoch != stored.plan_epoch:
        raise StoreError(
            f"job {job_id}: shadow {shadow.shadow_id} is of plan epoch {shadow.plan_epoch}, "
            f"the job is in {stored.plan_epoch}"
        )
    if shadow.step > stored.next_step:
        raise StoreError(
            f"job {job_id}: shadow {shadow.shadow_id} holds step {shadow.step}, but the next step is {stored.next_step}"
        )


def undone_reason(change: Change) -> str:
    """What stands in the ledger's rows that a change undoes."""
    return f"undone by {change.event}: {change.after.reason}"


def unknown_job(job_id: JobId) -> UnknownJobError:
    """What every method raises for a job that is not there."""
    return UnknownJobError(f"no job has the id {job_id}; `plutino jobs` lists them")


def _check_reservations(change: Change) -> None:
    job_id = change.after.job_id
    for reservation in change.reservations:
        if reservation.job_id != job_id:
            raise StoreError(f"job {job_id}: its change reserves memory for {reservation.job_id}")
    if len({reservation.agent_id for reservation in change.reservations}) < len(change.reservations):
        raise StoreError(f"job {job_id}: two reservations on one device; add them up")
