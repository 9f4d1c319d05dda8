"""What only the store on disk promises: durability, one holder, group commit, honest failure."""

from __future__ import annotations

import json
import os
import sqlite3
import stat
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest

from coordinator.jobs.lineage import next_step
from coordinator.jobs.record import JobRecord, JobState
from coordinator.storage.schema import SCHEMA_VERSION
from coordinator.storage.sqlite import SqliteStore
from coordinator.storage.writer import MAX_WRITES_PER_COMMIT, GroupCommitWriter
from plutino.errors import StoreError
from plutino.events import Notice
from plutino.types import JobId

JOB = JobId("job-1")
RECORD = JobRecord(job_id=JOB, name="j", spec_json="{}", submitted_at_s=0.0, state=JobState.RUNNING)
WAIT_S = 20.0
ROOT = Path(__file__).parents[3]

COMMITTING_CHILD = """
import sys
from dataclasses import replace
from pathlib import Path
from coordinator.jobs.lineage import LedgerRow, LedgerStatus
from coordinator.jobs.record import JobRecord, JobState
from coordinator.storage.sqlite import SqliteStore

store = SqliteStore(Path(sys.argv[1]))
record = JobRecord(job_id="job-1", name="j", spec_json="{}", submitted_at_s=0.0, state=JobState.RUNNING)
store.submit(record).result()
for step in range(100_000):
    after = replace(record, next_step=step + 1)
    row = LedgerRow(step=step, plan_epoch=1, status=LedgerStatus.COMMITTED, sample_indices=(step,))
    store.commit_step(row, record, after, at_s=0.0).result()
    print(step, flush=True)
    record = after
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "plutino.db"


def open_and_close(path: Path) -> None:
    SqliteStore(path).close()


def blocked_writer(path: Path) -> tuple[GroupCommitWriter, threading.Event]:
    """A writer that is busy with its first commit until the event is set."""
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    connection.execute("CREATE TABLE t (x INTEGER UNIQUE)")
    writer, started, gate = GroupCommitWriter(connection), threading.Event(), threading.Event()

    def wait(_: sqlite3.Connection) -> None:
        started.set()
        assert gate.wait(WAIT_S)

    writer.submit(wait)
    assert started.wait(WAIT_S)
    return writer, gate


def numbers(path: Path) -> list[int]:
    with closing(sqlite3.connect(path)) as connection:
        return [row[0] for row in connection.execute("SELECT x FROM t ORDER BY rowid")]


def test_sqlite_store_reopened_holds_what_was_written(path: Path) -> None:
    with closing(SqliteStore(path)) as store:
        store.submit(RECORD).result(WAIT_S)
        store.allocate_unit_serials(JOB, 7).result(WAIT_S)
        store.next_incarnation().result(WAIT_S)

    with closing(SqliteStore(path)) as store:
        assert store.jobs() == (RECORD,)
        assert store.allocate_unit_serials(JOB, 1).result(WAIT_S) == range(8, 9)
        assert store.next_incarnation().result(WAIT_S) == 2


def test_sqlite_store_killed_between_commits_holds_every_step_that_was_reported(path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", COMMITTING_CHILD, str(path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        assert child.stdout is not None
        reported = [int(child.stdout.readline()) for _ in range(25)]
    finally:
        child.kill()
        rest, _ = child.communicate(timeout=WAIT_S)
    reported += [int(line) for line in rest.splitlines() if line]

    with closing(SqliteStore(path)) as store:
        ledger = store.ledger(JOB)
        # The ledger is a prefix of the run: it may hold one step more than was reported, never one less.
        assert [row.step for row in ledger] == list(range(len(ledger)))
        assert len(ledger) - len(reported) in (0, 1)
        assert store.job(JOB).next_step == next_step(ledger)
        assert store.problems() == ()


def test_sqlite_store_syncs_every_commit(path: Path) -> None:
    with closing(SqliteStore(path)) as store:
        pragmas = {
            name: store._writer.submit(lambda connection, name=name: connection.execute(f"PRAGMA {name}").fetchone()[0])
            for name in ("journal_mode", "synchronous", "foreign_keys")
        }

        assert {name: future.result(WAIT_S) for name, future in pragmas.items()} == {
            "journal_mode": "wal",
            "synchronous": 2,
            "foreign_keys": 1,
        }


def test_sqlite_store_files_are_for_their_owner_alone(path: Path) -> None:
    with closing(SqliteStore(path)) as store:
        store.submit(RECORD).result(WAIT_S)
        modes = {stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}

    assert modes == {0o600}


def test_sqlite_store_held_by_another_coordinator_names_its_pid_and_start(path: Path) -> None:
    with (
        closing(SqliteStore(path, clock=lambda: 0.0)),
        pytest.raises(StoreError, match=f"pid {os.getpid()}, started 1970-01-01 00:00:00 UTC; stop that coordinator"),
    ):
        SqliteStore(path)


def test_sqlite_store_lock_of_a_dead_holder_does_not_block(path: Path) -> None:
    path.with_name(path.name + ".lock").write_text(json.dumps({"pid": 1, "started_at_s": 0.0}))

    open_and_close(path)


def test_sqlite_store_of_newer_plutino_is_refused_and_let_go(path: Path) -> None:
    open_and_close(path)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE schema_version SET version = version + 1")

    for _ in range(2):
        with pytest.raises(StoreError, match=f"has schema {SCHEMA_VERSION + 1}.*upgrade plutino"):
            SqliteStore(path)


def test_sqlite_store_of_another_program_is_refused_and_left_alone(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE recipes (name TEXT)")
    content = path.read_bytes()

    with pytest.raises(StoreError, match="another program"):
        SqliteStore(path)

    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "make", [lambda path: path.write_text("no database" * 100), Path.mkdir], ids=["text", "folder"]
)
def test_sqlite_store_that_is_no_database_tells_the_way_out(path: Path, make: object) -> None:
    make(path)  # type: ignore[operator]

    with pytest.raises(StoreError, match=r"cannot be opened as a database.*restore it"):
        SqliteStore(path)


def test_sqlite_store_in_missing_folder_tells_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"cannot be opened \(No such file or directory\)"):
        SqliteStore(tmp_path / "nowhere" / "plutino.db")


def test_sqlite_store_problems_names_rows_without_a_job(path: Path) -> None:
    open_and_close(path)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("INSERT INTO scores VALUES ('nobody', 'before', '{}')")

    with closing(SqliteStore(path)) as store:
        assert store.problems() == (f"{path}: a row of scores belongs to no job",)


def test_sqlite_store_concurrent_writers_share_syncs_and_lose_nothing(path: Path) -> None:
    with closing(SqliteStore(path)) as store:
        store.submit(RECORD).result(WAIT_S)
        before = store.num_commits

        def write(writer: int) -> None:
            futures = [
                store.append_events(JOB, [Notice(level="info", text=f"{writer} {index}")], at_s=0.0)
                for index in range(50)
            ]
            for future in futures:
                future.result(WAIT_S)

        threads = [threading.Thread(target=write, args=(writer,)) for writer in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)

        texts = [each.event.text for each in store.events(JOB) if isinstance(each.event, Notice)]
        assert store.num_commits - before < 200
    for writer in range(4):
        own = [text for text in texts if text.startswith(f"{writer} ")]
        assert own == [f"{writer} {index}" for index in range(50)]


def test_group_commit_pending_writes_share_one_sync_in_order(path: Path) -> None:
    writer, gate = blocked_writer(path)
    futures = [
        writer.submit(lambda connection, x=x: connection.execute("INSERT INTO t VALUES (?)", (x,)).rowcount)
        for x in range(MAX_WRITES_PER_COMMIT)
    ]
    assert not any(future.done() for future in futures)
    gate.set()
    writer.close()

    assert [future.result(WAIT_S) for future in futures] == [1] * MAX_WRITES_PER_COMMIT
    assert writer.num_commits == 2
    assert numbers(path) == list(range(MAX_WRITES_PER_COMMIT))


def test_group_commit_refused_write_takes_back_only_itself(path: Path) -> None:
    writer, gate = blocked_writer(path)

    def two_rows(connection: sqlite3.Connection, first: int, second: int) -> None:
        connection.execute("INSERT INTO t VALUES (?)", (first,))
        connection.execute("INSERT INTO t VALUES (?)", (second,))

    futures = [
        writer.submit(lambda connection, pair=pair: two_rows(connection, *pair)) for pair in ((1, 2), (3, 1), (4, 5))
    ]
    gate.set()
    writer.close()

    assert [type(future.exception(WAIT_S)) for future in futures] == [type(None), StoreError, type(None)]
    assert numbers(path) == [1, 2, 4, 5]


def test_group_commit_failing_disk_fails_the_batch_and_everything_after(path: Path) -> None:
    writer, gate = blocked_writer(path)

    def fail(_: sqlite3.Connection) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    futures = [
        writer.submit(lambda connection: connection.execute("INSERT INTO t VALUES (1)")),
        writer.submit(fail),
    ]
    gate.set()
    errors = [future.exception(WAIT_S) for future in futures]
    later = writer.submit(lambda connection: connection.execute("INSERT INTO t VALUES (2)")).exception(WAIT_S)
    writer.close()

    assert {type(error) for error in (*errors, later)} == {StoreError}
    assert "disk is full" in str(later)
    assert "start the coordinator again" in str(later)
    assert writer.is_broken
    assert numbers(path) == []
