"""Where the coordinator's truth lies: the contract that every store keeps.

Every write is one transaction, takes effect in the order of the calls, and gives a Future that ends when the write is
on disk (await it through ``asyncio.wrap_future``). A write that was handed in happens: its Future cannot be cancelled.
Reads are immediate and see every write whose Future has ended. All methods may be called from any thread.

A Future raises StoreError when the write contradicts what is stored or the disk fails, UnknownJobError for a job that
is not there. A refused write changes nothing, and other writes go on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal

from coordinator.jobs.lineage import EvaluationRow, LedgerRow
from coordinator.jobs.record import JobRecord, JobState
from coordinator.jobs.recovery import Shadow
from coordinator.scheduling.scheduler import Reservation
from plutino.events import JobEvent
from plutino.types import JobId

ScoringMoment = Literal["before", "after", "few_shot", "general_before", "general_after"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """Everything that one event makes true of a job, written together or not at all.

    If ``after.next_step`` lies below ``before.next_step``, the ledger's rows from there on become undone, and the
    evaluations and shadows of later steps go, in the same transaction. The plan epoch must rise with it.
    """

    before: JobRecord
    """What the decision was based on. State, plan epoch and next step must still be the stored ones."""
    after: JobRecord
    event: str
    """Name of the event, for the log of transitions."""
    at_s: float
    """Seconds since 1970, UTC."""
    ledger_row: LedgerRow | None = None
    """The step decided by this event. Exactly then ``after.next_step`` is one more than ``before.next_step``."""
    evaluation: EvaluationRow | None = None
    """The evaluation measured by this event; it replaces one of the same step."""
    reservations: tuple[Reservation, ...] = ()
    """Memory that the job gets with this event; it must hold none yet."""
    events: tuple[JobEvent, ...] = ()
    """What watchers see of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TransitionRow:
    """One change of a job's state or plan epoch."""

    at_s: float
    event: str
    from_state: JobState
    to_state: JobState
    plan_epoch: int
    """After the event."""
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NumberedEvent:
    """An event as watchers get it."""

    number: int
    """Counted from 1 for each job, without gaps."""
    at_s: float
    event: JobEvent


class Store(ABC):
    """Jobs, their ledgers and all else that must outlive the coordinator's process."""

    # --- writes ------------------------------------------------------------------------------------------------------

    @abstractmethod
    def submit(
        self, record: JobRecord, *, idempotency_key: str | None = None, events: Sequence[JobEvent] = ()
    ) -> Future[JobRecord]:
        """Insert a job; with a key that was used before, nothing is written and the result is that key's job.

        The Future raises StoreError if the job's id is taken.
        """

    @abstractmethod
    def save(self, change: Change) -> Future[None]:
        """Write a change of a job; see :class:`Change` for its constraints."""

    def commit_step(
        self, row: LedgerRow, before: JobRecord, after: JobRecord, *, at_s: float, events: Sequence[JobEvent] = ()
    ) -> Future[None]:
        """Make a step committed or skipped: its ledger row and the job's next step. No worker may hear of it before."""
        return self.save(
            Change(
                before=before,
                after=after,
                event=f"Step{row.status.value.capitalize()}",
                at_s=at_s,
                ledger_row=row,
                events=tuple(events),
            )
        )

    @abstractmethod
    def release(self, job_id: JobId) -> Future[None]:
        """Delete all reservations of a job; harmless if there are none."""

    @abstractmethod
    def add_shadow(self, job_id: JobId, shadow: Shadow) -> Future[None]:
        """Record a verified shadow; the same one again is harmless.

        The Future raises StoreError if the shadow is of another plan epoch than the job (its step may since have been
        undone), of a step that is not decided yet, or if its id stands for other content.
        """

    @abstractmethod
    def remove_shadows(self, job_id: JobId, shadow_ids: Sequence[str]) -> Future[None]:
        """Forget shadows; unknown ids are harmless. Remove the files afterwards, never before."""

    @abstractmethod
    def put_scores(self, job_id: JobId, moment: ScoringMoment, scores_json: str) -> Future[None]:
        """Write a scoring's result in place of an earlier one."""

    @abstractmethod
    def append_events(self, job_id: JobId, events: Sequence[JobEvent], *, at_s: float) -> Future[None]:
        """Number events and append them to the job's."""

    @abstractmethod
    def allocate_unit_serials(self, job_id: JobId, count: int) -> Future[range]:
        """A block of unit serials that no call ever gave or will give for this job, restarts included; from 1 on.

        Taking many at once spares a sync for each unit; what a crash leaves unused is lost and not missed.
        """

    @abstractmethod
    def next_incarnation(self) -> Future[int]:
        """Count a start of the coordinator; from 1 on."""

    @abstractmethod
    def put_value(self, key: str, value: str) -> Future[None]:
        """Set a named value (the coordinator's endpoint, ...) in place of an earlier one."""

    # --- reads -------------------------------------------------------------------------------------------------------

    @abstractmethod
    def job(self, job_id: JobId) -> JobRecord:
        """One job.

        Raises:
            UnknownJobError: no job has this id.
        """

    @abstractmethod
    def jobs(self) -> tuple[JobRecord, ...]:
        """All jobs in the order of their submission."""

    @abstractmethod
    def submitted_as(self, idempotency_key: str) -> JobRecord | None:
        """The job that was submitted with this key; None if none was."""

    @abstractmethod
    def transitions(self, job_id: JobId) -> tuple[TransitionRow, ...]:
        """The job's changes of state or plan epoch, oldest first."""

    @abstractmethod
    def ledger(self, job_id: JobId) -> tuple[LedgerRow, ...]:
        """Every row ever written for the job, undone ones included, by (plan epoch, step)."""

    @abstractmethod
    def evaluations(self, job_id: JobId) -> tuple[EvaluationRow, ...]:
        """Evaluations on the surviving lineage, by step."""

    @abstractmethod
    def shadows(self, job_id: JobId) -> tuple[Shadow, ...]:
        """Shadows that are not removed, by (step, id)."""

    @abstractmethod
    def scores(self, job_id: JobId) -> dict[ScoringMoment, str]:
        """Results of scorings as JSON."""

    @abstractmethod
    def events(self, job_id: JobId, *, after: int = 0, limit: int = 1000) -> tuple[NumberedEvent, ...]:
        """The job's events with a number above ``after``, at most ``limit``, in order."""

    @abstractmethod
    def reservations(self) -> tuple[Reservation, ...]:
        """All reservations, by (job, agent)."""

    @abstractmethod
    def value(self, key: str) -> str | None:
        """A named value; None if it was never set."""

    @abstractmethod
    def problems(self) -> tuple[str, ...]:
        """What is wrong with the store itself, one sentence each; empty if it is sound. Reads all of it."""

    # --- life --------------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def is_broken(self) -> bool:
        """Whether the disk has failed: no write will ever succeed, and the coordinator has to end and start anew."""

    @abstractmethod
    def close(self) -> None:
        """End all writes that were handed in, then let the store go; harmless when repeated.

        Writes after it raise StoreError from the call itself.
        """
