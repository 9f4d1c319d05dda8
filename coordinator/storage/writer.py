"""One thread that owns a SQLite connection and makes many pending writes share one sync.

A FULL sync costs milliseconds, an insert microseconds. So the thread takes whatever has queued up while it was syncing,
runs each write under its own savepoint, and commits all of them at once: writes keep their order, each stands or falls
alone, and none is reported done before it is on disk.
"""

from __future__ import annotations

import logging
import queue
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from plutino.errors import StoreError

_log = logging.getLogger(__name__)

T = TypeVar("T")

MAX_WRITES_PER_COMMIT = 256
"""Bounds how long the first write of a batch waits for the last one's insert."""


@dataclass(frozen=True, slots=True)
class _Pending:
    write: Callable[[sqlite3.Connection], Any]
    future: Future[Any]


class GroupCommitWriter:
    """Runs writes in the order they were handed in, from any thread.

    If the disk fails (full, read-only, damaged), nobody can know what of the batch it holds: all pending writes raise
    StoreError and so does every later one. Starting anew from what is on disk is the only honest way on.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        """Start the thread.

        Args:
            connection: in autocommit mode (``isolation_level=None``), usable from other threads; closed at the end.
        """
        self._connection = connection
        self._queue: queue.SimpleQueue[_Pending | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._is_closed = False
        self._broken: StoreError | None = None
        self._num_commits = 0
        self._thread = threading.Thread(target=self._run, name="store-writer", daemon=True)
        self._thread.start()

    @property
    def num_commits(self) -> int:
        """Number of transactions so far, each of them one sync."""
        return self._num_commits

    @property
    def is_broken(self) -> bool:
        """Whether the disk has failed, so that nothing will ever be written again."""
        return self._broken is not None

    def submit(self, write: Callable[[sqlite3.Connection], T]) -> Future[T]:
        """Queue a write; the Future ends after the sync.

        Raises:
            StoreError: the writer is closed.
        """
        future: Future[T] = Future()
        # A running future cannot be cancelled: a task that stops waiting must not undo a decision it has taken.
        future.set_running_or_notify_cancel()
        # The lock keeps a write from slipping in behind the end mark, where nobody would ever run it.
        with self._lock:
            if self._is_closed:
                raise StoreError("the store is closed; nothing can be written any more")
            self._queue.put(_Pending(write, future))
        return future

    def close(self) -> None:
        """Run what is queued, end the thread and close the connection; harmless when repeated."""
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        is_last = False
        while not is_last:
            batch, is_last = self._next_batch()
            if batch:
                self._commit(batch)
        self._connection.close()

    def _next_batch(self) -> tuple[list[_Pending], bool]:
        batch: list[_Pending] = []
        item = self._queue.get()
        while item is not None:
            batch.append(item)
            if len(batch) == MAX_WRITES_PER_COMMIT:
                return batch, False
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                return batch, False
        return batch, True

    def _commit(self, batch: list[_Pending]) -> None:
        outcomes: list[tuple[Future[Any], Any, Exception | None]] = []
        try:
            if self._broken is not None:
                raise self._broken
            self._connection.execute("BEGIN IMMEDIATE")
            for pending in batch:
                outcomes.append((pending.future, *self._attempt(pending.write)))
            self._connection.execute("COMMIT")
            self._num_commits += 1
        except (sqlite3.Error, StoreError) as error:
            self._break(error)
            for pending in batch:
                pending.future.set_exception(cast("StoreError", self._broken))
            return
        for future, result, failure in outcomes:
            if failure is None:
                future.set_result(result)
            else:
                future.set_exception(failure)

    def _attempt(self, write: Callable[[sqlite3.Connection], Any]) -> tuple[Any, Exception | None]:
        """One write under a savepoint: its result, or its own error; errors of the disk go through."""
        self._connection.execute("SAVEPOINT one_write")
        try:
            result = write(self._connection)
        except Exception as error:
            if _is_of_the_disk(error):
                raise
            self._connection.execute("ROLLBACK TO one_write")
            self._connection.execute("RELEASE one_write")
            return None, _explained(error)
        self._connection.execute("RELEASE one_write")
        return result, None

    def _break(self, error: Exception) -> None:
        if self._broken is not None:
            return
        self._broken = StoreError(
            f"the database could not be written ({error}); free space on its disk or repair it, then start the "
            "coordinator again: it goes on from the last write on disk"
        )
        self._broken.__cause__ = error
        _log.error("%s", self._broken)
        try:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
        except sqlite3.Error as rollback_error:
            # Nothing more is written through this connection, and closing it rolls back too.
            _log.error("rolling back failed as well: %s", rollback_error)


def _explained(error: Exception) -> Exception:
    """A constraint of the schema speaks as StoreError; everything else as itself."""
    if not isinstance(error, sqlite3.IntegrityError):
        return error
    explained = StoreError(f"a write contradicts what is stored ({error}) and was refused; nothing was changed")
    explained.__cause__ = error
    return explained


def _is_of_the_disk(error: Exception) -> bool:
    """Whether an error casts doubt on the database, rather than on the one write that met it."""
    own = (sqlite3.IntegrityError, sqlite3.ProgrammingError, sqlite3.InterfaceError, sqlite3.DataError)
    return isinstance(error, sqlite3.Error) and not isinstance(error, own)
