# ruff: noqa: D102 - the contract of every method stands in base.py
"""A store that forgets everything with its process: for tests and for a coordinator on trial."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeVar

from coordinator.jobs.lineage import EvaluationRow, LedgerRow, undo
from coordinator.jobs.record import JobRecord
from coordinator.jobs.recovery import Shadow
from coordinator.scheduling.scheduler import Reservation
from coordinator.storage.base import Change, NumberedEvent, ScoringMoment, Store, TransitionRow
from coordinator.storage.rules import Position, check_change, check_shadow, undone_reason, unknown_job
from plutino.errors import PlutinoError, StoreError
from plutino.events import JobEvent
from plutino.types import AgentId, JobId

T = TypeVar("T")


@dataclass(slots=True)
class _Job:
    record: JobRecord
    transitions: list[TransitionRow] = field(default_factory=list)
    ledger: list[LedgerRow] = field(default_factory=list)
    evaluations: dict[int, EvaluationRow] = field(default_factory=dict)
    shadows: dict[str, Shadow] = field(default_factory=dict)
    scores: dict[ScoringMoment, str] = field(default_factory=dict)
    events: list[NumberedEvent] = field(default_factory=list)
    next_unit_serial: int = 1


class MemoryStore(Store):
    """Every write is done when the call returns."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._jobs: dict[JobId, _Job] = {}
        self._keys: dict[str, JobId] = {}
        self._reservations: dict[tuple[JobId, AgentId], Reservation] = {}
        self._values: dict[str, str] = {}
        self._incarnation = 0
        self._is_closed = False

    def submit(
        self, record: JobRecord, *, idempotency_key: str | None = None, events: Sequence[JobEvent] = ()
    ) -> Future[JobRecord]:
        def write() -> JobRecord:
            if idempotency_key is not None and idempotency_key in self._keys:
                return self._jobs[self._keys[idempotency_key]].record
            if record.job_id in self._jobs:
                raise StoreError(f"a job with the id {record.job_id} exists already")
            self._jobs[record.job_id] = _Job(record)
            if idempotency_key is not None:
                self._keys[idempotency_key] = record.job_id
            self._number(record.job_id, events, record.submitted_at_s)
            return record

        return self._do(write)

    def save(self, change: Change) -> Future[None]:
        def write() -> None:
            job = self._find(change.after.job_id)
            check_change(Position.of(job.record), change)
            self._reserve(change)
            if change.after.next_step < change.before.next_step:
                self._undo(job, change)
            if change.ledger_row is not None:
                job.ledger.append(change.ledger_row)
            if change.evaluation is not None:
                job.evaluations[change.evaluation.step] = change.evaluation
            before, after = job.record, change.after
            if (before.state, before.plan_epoch) != (after.state, after.plan_epoch):
                job.transitions.append(
                    TransitionRow(
                        at_s=change.at_s,
                        event=change.event,
                        from_state=before.state,
                        to_state=after.state,
                        plan_epoch=after.plan_epoch,
                        reason=after.reason,
                    )
                )
            job.record = after
            self._number(after.job_id, change.events, change.at_s)

        return self._do(write)

    def release(self, job_id: JobId) -> Future[None]:
        def write() -> None:
            self._reservations = {key: row for key, row in self._reservations.items() if row.job_id != job_id}

        return self._do(write)

    def add_shadow(self, job_id: JobId, shadow: Shadow) -> Future[None]:
        def write() -> None:
            job = self._find(job_id)
            if job.shadows.get(shadow.shadow_id) == shadow:
                return
            check_shadow(job_id, Position.of(job.record), shadow)
            if shadow.shadow_id in job.shadows:
                raise StoreError(f"job {job_id}: shadow {shadow.shadow_id} exists with other content")
            job.shadows[shadow.shadow_id] = shadow

        return self._do(write)

    def remove_shadows(self, job_id: JobId, shadow_ids: Sequence[str]) -> Future[None]:
        def write() -> None:
            job = self._find(job_id)
            for shadow_id in shadow_ids:
                job.shadows.pop(shadow_id, None)

        return self._do(write)

    def put_scores(self, job_id: JobId, moment: ScoringMoment, scores_json: str) -> Future[None]:
        return self._do(lambda: self._find(job_id).scores.__setitem__(moment, scores_json))

    def append_events(self, job_id: JobId, events: Sequence[JobEvent], *, at_s: float) -> Future[None]:
        return self._do(lambda: self._number(job_id, events, at_s))

    def allocate_unit_serials(self, job_id: JobId, count: int) -> Future[range]:
        def write() -> range:
            job = self._find(job_id)
            first = job.next_unit_serial
            job.next_unit_serial += count
            return range(first, first + count)

        return self._do(write)

    def next_incarnation(self) -> Future[int]:
        def write() -> int:
            self._incarnation += 1
            return self._incarnation

        return self._do(write)

    def put_value(self, key: str, value: str) -> Future[None]:
        return self._do(lambda: self._values.__setitem__(key, value))

    def job(self, job_id: JobId) -> JobRecord:
        with self._lock:
            return self._find(job_id).record

    def jobs(self) -> tuple[JobRecord, ...]:
        with self._lock:
            return tuple(job.record for job in self._jobs.values())

    def submitted_as(self, idempotency_key: str) -> JobRecord | None:
        with self._lock:
            job_id = self._keys.get(idempotency_key)
            return None if job_id is None else self._jobs[job_id].record

    def transitions(self, job_id: JobId) -> tuple[TransitionRow, ...]:
        with self._lock:
            return tuple(self._find(job_id).transitions)

    def ledger(self, job_id: JobId) -> tuple[LedgerRow, ...]:
        with self._lock:
            return tuple(sorted(self._find(job_id).ledger, key=lambda row: (row.plan_epoch, row.step)))

    def evaluations(self, job_id: JobId) -> tuple[EvaluationRow, ...]:
        with self._lock:
            return tuple(sorted(self._find(job_id).evaluations.values(), key=lambda row: row.step))

    def shadows(self, job_id: JobId) -> tuple[Shadow, ...]:
        with self._lock:
            return tuple(sorted(self._find(job_id).shadows.values(), key=lambda row: (row.step, row.shadow_id)))

    def scores(self, job_id: JobId) -> dict[ScoringMoment, str]:
        with self._lock:
            return dict(self._find(job_id).scores)

    def events(self, job_id: JobId, *, after: int = 0, limit: int = 1000) -> tuple[NumberedEvent, ...]:
        with self._lock:
            return tuple(self._find(job_id).events[after : after + limit])

    def reservations(self) -> tuple[Reservation, ...]:
        with self._lock:
            return tuple(self._reservations[key] for key in sorted(self._reservations))

    def value(self, key: str) -> str | None:
        with self._lock:
            return self._values.get(key)

    def problems(self) -> tuple[str, ...]:
        return ()

    @property
    def is_broken(self) -> bool:
        return False

    def close(self) -> None:
        with self._lock:
            self._is_closed = True

    def _do(self, write: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        with self._lock:
            if self._is_closed:
                raise StoreError("the store is closed; nothing can be written any more")
            try:
                future.set_result(write())
            except PlutinoError as error:
                future.set_exception(error)
        return future

    def _find(self, job_id: JobId) -> _Job:
        job = self._jobs.get(job_id)
        if job is None:
            raise unknown_job(job_id)
        return job

    def _reserve(self, change: Change) -> None:
        if not change.reservations:
            return
        if any(row.job_id == change.after.job_id for row in self._reservations.values()):
            raise StoreError(f"job {change.after.job_id} holds memory already; release it first")
        self._reservations.update({(row.job_id, row.agent_id): row for row in change.reservations})

    def _undo(self, job: _Job, change: Change) -> None:
        step = change.after.next_step
        job.ledger = list(undo(job.ledger, step, undone_reason(change)))
        job.evaluations = {at: row for at, row in job.evaluations.items() if at <= step}
        job.shadows = {key: row for key, row in job.shadows.items() if row.step <= step}

    def _number(self, job_id: JobId, events: Sequence[JobEvent], at_s: float) -> None:
        stored = self._find(job_id).events
        first = len(stored) + 1
        stored.extend(
            NumberedEvent(number=number, at_s=at_s, event=event) for number, event in enumerate(events, start=first)
        )
