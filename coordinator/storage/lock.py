"""One coordinator to a database: a lock file that the kernel frees when its holder dies."""

from __future__ import annotations

import fcntl
import json
import os
from datetime import datetime, timezone
from pathlib import Path

from plutino.errors import StoreError


class DatabaseLock:
    """Holds ``<database>.lock`` from its construction to :meth:`release`.

    The lock is the kernel's (flock), so a crashed holder never blocks its successor; the file's content only tells a
    person who holds it. The file stays: deleting it would let two holders lock two different files.
    """

    def __init__(self, database: Path, *, now_s: float) -> None:
        """Take the lock.

        Args:
            database: the file that is guarded; need not exist.
            now_s: seconds since 1970, noted in the lock file as the holder's start.

        Raises:
            StoreError: another process, or another lock of this one, holds it; or the file cannot be made.
        """
        path = database.with_name(database.name + ".lock")
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StoreError(
                f"{path} cannot be opened ({error.strerror}); make its folder writable or start with another state "
                "folder"
            ) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = _read_holder(self._file)
            os.close(self._file)
            raise StoreError(
                f"{database} is in use by {holder}; stop that coordinator or start this one with another state folder"
            ) from error
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, json.dumps({"pid": os.getpid(), "started_at_s": now_s}).encode(), 0)

    def release(self) -> None:
        """Let the next holder in; harmless when repeated."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _read_holder(file: int) -> str:
    try:
        holder = json.loads(os.pread(file, 4096, 0))
        started = datetime.fromtimestamp(holder["started_at_s"], tz=timezone.utc)
        return f"a coordinator with pid {holder['pid']}, started {started:%Y-%m-%d %H:%M:%S} UTC"
    except (ValueError, KeyError, TypeError):
        # The holder may be between taking the lock and writing its name.
        return "another coordinator that is just starting"
