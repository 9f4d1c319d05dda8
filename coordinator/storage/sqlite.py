# ruff: noqa: D102 - the contract of every method stands in base.py
"""The coordinator's database: SQLite in WAL mode with ``synchronous=FULL``, one writer, one coordinator.

FULL, because under NORMAL a power cut may take back a committed transaction, and a worker may have applied its step.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, TypeVar

from coordinator.jobs.lineage import EvaluationRow, LedgerRow
from coordinator.jobs.record import JobRecord, JobState
from coordinator.jobs.recovery import Shadow
from coordinator.scheduling.scheduler import Reservation
from coordinator.storage import rows
from coordinator.storage.base import Change, NumberedEvent, ScoringMoment, Store, TransitionRow
from coordinator.storage.lock import DatabaseLock
from coordinator.storage.rules import Position, check_change, check_shadow, undone_reason, unknown_job
from coordinator.storage.schema import migrate
from coordinator.storage.writer import GroupCommitWriter
from plutino.errors import StoreError
from plutino.events import JobEvent, event_json
from plutino.types import JobId

T = TypeVar("T")

BUSY_TIMEOUT_S = 5.0
"""How long to wait for another process's lock on the database (a backup, a curious shell)."""


class SqliteStore(Store):
    """A store in one file, plus SQLite's ``-wal`` and ``-shm`` and the lock file beside it."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        """Open or create the database.

        Args:
            path: the file; its folder must exist.
            clock: gives seconds since 1970, for the lock file.

        Raises:
            StoreError: another coordinator has it open, it is damaged, or a newer plutino wrote it.
        """
        self._path = path
        self._read_lock = threading.Lock()
        with ExitStack() as undo:
            self._lock = DatabaseLock(path, now_s=clock())
            undo.callback(self._lock.release)
            try:
                # Specs and answers are nobody else's business; SQLite gives its other files the same mode.
                path.touch(mode=0o600)
                connection = undo.enter_context(closing(_connect(path)))
                migrate(connection, str(path))
                _use_wal(connection, path)
                self._reader = undo.enter_context(closing(_connect(path)))
                self._reader.execute("PRAGMA query_only = ON")
            except (sqlite3.Error, OSError) as error:
                raise StoreError(
                    f"{path} cannot be opened as a database ({error}); restore it from a backup or start with "
                    "another state folder"
                ) from error
            self._writer = GroupCommitWriter(connection)
            undo.pop_all()

    @property
    def num_commits(self) -> int:
        """Number of transactions since the store was opened, each of them one sync."""
        return self._writer.num_commits

    def submit(
        self, record: JobRecord, *, idempotency_key: str | None = None, events: Sequence[JobEvent] = ()
    ) -> Future[JobRecord]:
        def write(connection: sqlite3.Connection) -> JobRecord:
            if idempotency_key is not None:
                known = _find_by_key(connection, idempotency_key)
                if known is not None:
                    return known
            if _is_known(connection, record.job_id):
                raise StoreError(f"a job with the id {record.job_id} exists already")
            connection.execute(rows.INSERT_JOB, rows.job_parameters(record))
            _put_documents(connection, record.job_id, rows.job_documents(record))
            if idempotency_key is not None:
                connection.execute("INSERT INTO idempotency_keys VALUES (?, ?)", (idempotency_key, record.job_id))
            _number(connection, record.job_id, events, record.submitted_at_s)
            return record

        return self._writer.submit(write)

    def save(self, change: Change) -> Future[None]:
        return self._writer.submit(lambda connection: _save(connection, change))

    def release(self, job_id: JobId) -> Future[None]:
        def write(connection: sqlite3.Connection) -> None:
            connection.execute("DELETE FROM reservations WHERE job_id = ?", (job_id,))

        return self._writer.submit(write)

    def add_shadow(self, job_id: JobId, shadow: Shadow) -> Future[None]:
        def write(connection: sqlite3.Connection) -> None:
            position = _position(connection, job_id)
            stored = connection.execute(
                "SELECT * FROM shadows WHERE job_id = ? AND shadow_id = ?", (job_id, shadow.shadow_id)
            ).fetchone()
            if stored is not None and rows.shadow(stored) == shadow:
                return
            check_shadow(job_id, position, shadow)
            if stored is not None:
                raise StoreError(f"job {job_id}: shadow {shadow.shadow_id} exists with other content")
            connection.execute(rows.INSERT_SHADOW, rows.shadow_parameters(job_id, shadow))

        return self._writer.submit(write)

    def remove_shadows(self, job_id: JobId, shadow_ids: Sequence[str]) -> Future[None]:
        def write(connection: sqlite3.Connection) -> None:
            _position(connection, job_id)
            connection.executemany(
                "DELETE FROM shadows WHERE job_id = ? AND shadow_id = ?", [(job_id, each) for each in shadow_ids]
            )

        return self._writer.submit(write)

    def put_scores(self, job_id: JobId, moment: ScoringMoment, scores_json: str) -> Future[None]:
        def write(connection: sqlite3.Connection) -> None:
            _position(connection, job_id)
            connection.execute("INSERT OR REPLACE INTO scores VALUES (?, ?, ?)", (job_id, moment, scores_json))

        return self._writer.submit(write)

    def append_events(self, job_id: JobId, events: Sequence[JobEvent], *, at_s: float) -> Future[None]:
        def write(connection: sqlite3.Connection) -> None:
            _position(connection, job_id)
            _number(connection, job_id, events, at_s)

        return self._writer.submit(write)

    def allocate_unit_serials(self, job_id: JobId, count: int) -> Future[range]:
        def write(connection: sqlite3.Connection) -> range:
            _position(connection, job_id)
            query = "SELECT next_unit_serial FROM jobs WHERE job_id = ?"
            first = int(connection.execute(query, (job_id,)).fetchone()[0])
            connection.execute("UPDATE jobs SET next_unit_serial = ? WHERE job_id = ?", (first + count, job_id))
            return range(first, first + count)

        return self._writer.submit(write)

    def next_incarnation(self) -> Future[int]:
        def write(connection: sqlite3.Connection) -> int:
            connection.execute("INSERT OR IGNORE INTO counters VALUES ('incarnation', 0)")
            connection.execute("UPDATE counters SET value = value + 1 WHERE name = 'incarnation'")
            return int(connection.execute("SELECT value FROM counters WHERE name = 'incarnation'").fetchone()[0])

        return self._writer.submit(write)

    def put_value(self, key: str, value: str) -> Future[None]:
        def write(connection: sqlite3.Connection) -> None:
            connection.execute("INSERT OR REPLACE INTO key_values VALUES (?, ?)", (key, value))

        return self._writer.submit(write)

    def job(self, job_id: JobId) -> JobRecord:
        return self._read(lambda connection: _find(connection, job_id))

    def jobs(self) -> tuple[JobRecord, ...]:
        def read(connection: sqlite3.Connection) -> tuple[JobRecord, ...]:
            found = connection.execute("SELECT * FROM jobs ORDER BY sequence").fetchall()
            return tuple(rows.job_record(row, _documents(connection, JobId(row["job_id"]))) for row in found)

        return self._read(read)

    def submitted_as(self, idempotency_key: str) -> JobRecord | None:
        return self._read(lambda connection: _find_by_key(connection, idempotency_key))

    def transitions(self, job_id: JobId) -> tuple[TransitionRow, ...]:
        return self._of_job(job_id, "SELECT * FROM transitions WHERE job_id = ? ORDER BY sequence", rows.transition_row)

    def ledger(self, job_id: JobId) -> tuple[LedgerRow, ...]:
        return self._of_job(job_id, "SELECT * FROM ledger WHERE job_id = ? ORDER BY plan_epoch, step", rows.ledger_row)

    def evaluations(self, job_id: JobId) -> tuple[EvaluationRow, ...]:
        return self._of_job(job_id, "SELECT * FROM evaluations WHERE job_id = ? ORDER BY step", rows.evaluation_row)

    def shadows(self, job_id: JobId) -> tuple[Shadow, ...]:
        return self._of_job(job_id, "SELECT * FROM shadows WHERE job_id = ? ORDER BY step, shadow_id", rows.shadow)

    def scores(self, job_id: JobId) -> dict[ScoringMoment, str]:
        pairs: tuple[tuple[ScoringMoment, str], ...] = self._of_job(
            job_id, "SELECT moment, json FROM scores WHERE job_id = ?", lambda row: (row["moment"], row["json"])
        )
        return dict(pairs)

    def events(self, job_id: JobId, *, after: int = 0, limit: int = 1000) -> tuple[NumberedEvent, ...]:
        return self._of_job(
            job_id,
            "SELECT * FROM events WHERE job_id = ? AND number > ? ORDER BY number LIMIT ?",
            rows.numbered_event,
            after,
            limit,
        )

    def reservations(self) -> tuple[Reservation, ...]:
        query = "SELECT * FROM reservations ORDER BY job_id, agent_id"
        return self._read(lambda connection: tuple(rows.reservation(row) for row in connection.execute(query)))

    def value(self, key: str) -> str | None:
        query = "SELECT value FROM key_values WHERE key = ?"
        row = self._read(lambda connection: connection.execute(query, (key,)).fetchone())
        return None if row is None else str(row["value"])

    def problems(self) -> tuple[str, ...]:
        def read(connection: sqlite3.Connection) -> tuple[str, ...]:
            damage = [str(row[0]) for row in connection.execute("PRAGMA integrity_check")]
            orphans = connection.execute("PRAGMA foreign_key_check").fetchall()
            return (
                *(f"{self._path}: {line}; restore it from a backup" for line in damage if line != "ok"),
                *(f"{self._path}: a row of {row['table']} belongs to no job" for row in orphans),
            )

        return self._read(read)

    @property
    def is_broken(self) -> bool:
        return self._writer.is_broken

    def close(self) -> None:
        self._writer.close()
        with self._read_lock:
            self._reader.close()
        self._lock.release()

    def _read(self, read: Callable[[sqlite3.Connection], T]) -> T:
        # One statement at a time on the reading connection; the writer has its own, and WAL keeps them apart.
        with self._read_lock:
            try:
                return read(self._reader)
            except sqlite3.Error as error:
                raise StoreError(f"{self._path} cannot be read ({error}); `plutino doctor` tells more") from error

    def _of_job(self, job_id: JobId, query: str, convert: Callable[[sqlite3.Row], T], *more: int) -> tuple[T, ...]:
        def read(connection: sqlite3.Connection) -> tuple[T, ...]:
            if not _is_known(connection, job_id):
                raise unknown_job(job_id)
            return tuple(convert(row) for row in connection.execute(query, (job_id, *more)))

        return self._read(read)


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
    with ExitStack() as undo:
        undo.callback(connection.close)
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA synchronous = FULL")
        # On macOS a plain fsync leaves the data in the drive's cache; elsewhere these two do nothing.
        connection.execute("PRAGMA fullfsync = ON")
        connection.execute("PRAGMA checkpoint_fullfsync = ON")
        connection.execute("PRAGMA foreign_keys = ON")
        undo.pop_all()
    return connection


def _use_wal(connection: sqlite3.Connection, path: Path) -> None:
    # Only once the database is known to be ours: the mode is written into the file.
    mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
    if mode != "wal":
        raise StoreError(
            f"{path} lies on a file system without shared memory; start with a state folder on a local disk"
        )


def _save(connection: sqlite3.Connection, change: Change) -> None:
    before, after = change.before, change.after
    check_change(_position(connection, after.job_id), change)
    if after.next_step < before.next_step:
        _undo(connection, change)
    connection.execute(rows.UPDATE_JOB, rows.job_parameters(after))
    _put_documents(connection, after.job_id, rows.changed_documents(before, after))
    if change.ledger_row is not None:
        connection.execute(rows.INSERT_LEDGER_ROW, rows.ledger_parameters(after.job_id, change.ledger_row))
    if change.evaluation is not None:
        connection.execute(
            "INSERT OR REPLACE INTO evaluations VALUES (?, ?, ?)",
            (after.job_id, change.evaluation.step, change.evaluation.loss),
        )
    _reserve(connection, change)
    if (before.state, before.plan_epoch) != (after.state, after.plan_epoch):
        connection.execute(
            "INSERT INTO transitions (job_id, at_s, event, from_state, to_state, plan_epoch, reason) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                after.job_id,
                change.at_s,
                change.event,
                before.state.value,
                after.state.value,
                after.plan_epoch,
                after.reason,
            ),
        )
    _number(connection, after.job_id, change.events, change.at_s)


def _undo(connection: sqlite3.Connection, change: Change) -> None:
    job_id, step = change.after.job_id, change.after.next_step
    connection.execute(
        "UPDATE ledger SET status = 'undone', reason = ? WHERE job_id = ? AND step >= ? AND status <> 'undone'",
        (undone_reason(change), job_id, step),
    )
    connection.execute("DELETE FROM evaluations WHERE job_id = ? AND step > ?", (job_id, step))
    connection.execute("DELETE FROM shadows WHERE job_id = ? AND step > ?", (job_id, step))


def _reserve(connection: sqlite3.Connection, change: Change) -> None:
    if not change.reservations:
        return
    job_id = change.after.job_id
    if connection.execute("SELECT 1 FROM reservations WHERE job_id = ?", (job_id,)).fetchone() is not None:
        raise StoreError(f"job {job_id} holds memory already; release it first")
    connection.executemany(
        "INSERT INTO reservations VALUES (?, ?, ?)",
        [(row.job_id, row.agent_id, row.bytes) for row in change.reservations],
    )


def _put_documents(connection: sqlite3.Connection, job_id: JobId, documents: dict[str, str | None]) -> None:
    for name, text in documents.items():
        if text is None:
            connection.execute("DELETE FROM documents WHERE job_id = ? AND name = ?", (job_id, name))
        else:
            connection.execute("INSERT OR REPLACE INTO documents VALUES (?, ?, ?)", (job_id, name, text))


def _number(connection: sqlite3.Connection, job_id: JobId, events: Iterable[JobEvent], at_s: float) -> None:
    query = "SELECT COALESCE(MAX(number), 0) FROM events WHERE job_id = ?"
    last = int(connection.execute(query, (job_id,)).fetchone()[0])
    connection.executemany(
        "INSERT INTO events VALUES (?, ?, ?, ?, ?)",
        [(job_id, number, at_s, event.kind, event_json(event)) for number, event in enumerate(events, start=last + 1)],
    )


def _find_by_key(connection: sqlite3.Connection, idempotency_key: str) -> JobRecord | None:
    row = connection.execute("SELECT job_id FROM idempotency_keys WHERE key = ?", (idempotency_key,)).fetchone()
    return None if row is None else _find(connection, JobId(row["job_id"]))


def _find(connection: sqlite3.Connection, job_id: JobId) -> JobRecord:
    row: Any = connection.execute("SELECT * FROM jobs WHERE job_id = ?", (job_id,)).fetchone()
    if row is None:
        raise unknown_job(job_id)
    return rows.job_record(row, _documents(connection, job_id))


def _documents(connection: sqlite3.Connection, job_id: JobId) -> dict[str, str]:
    found = connection.execute("SELECT name, text FROM documents WHERE job_id = ?", (job_id,))
    return {row["name"]: row["text"] for row in found}


def _position(connection: sqlite3.Connection, job_id: JobId) -> Position:
    query = "SELECT state, plan_epoch, next_step FROM jobs WHERE job_id = ?"
    row: Any = connection.execute(query, (job_id,)).fetchone()
    if row is None:
        raise unknown_job(job_id)
    return Position(JobState(row["state"]), row["plan_epoch"], row["next_step"])


def _is_known(connection: sqlite3.Connection, job_id: JobId) -> bool:
    return connection.execute("SELECT 1 FROM jobs WHERE job_id = ?", (job_id,)).fetchone() is not None
