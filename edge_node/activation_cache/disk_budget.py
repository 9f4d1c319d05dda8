"""One byte budget for the activation caches of a folder, whoever writes there: workers, agents, processes, threads.

``<root>/lock`` is held (a flock, so the kernel lets go of it however a process ends) while entries are written, files
are opened and namespaces removed. In it stands how many bytes there are: never too few, because they are counted before
they are written. What a crash or a full disk counted too much is found when the budget seems used up, and all files are
counted anew.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

logger = logging.getLogger(__name__)

_LOCK_NAME = "lock"
_IN_USE_NAME = "in-use"
_COUNT = struct.Struct("<Q")
_REFUSALS_BETWEEN_COUNTS = 64
"""A full cache refuses every row of an epoch; whether others have let go of something is looked at this seldom."""


class DiskBudget:
    """The bytes of all namespaces below a folder.

    Args:
        root: the folder.
        budget_bytes: bound on all files below it together.
    """

    def __init__(self, root: Path, budget_bytes: int) -> None:
        self._root = root
        self._budget_bytes = budget_bytes
        self._refused_at_bytes = -1
        self._num_refusals = 0

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep everyone else from writing, opening and removing.

        Raises:
            OSError: the disk.
        """
        self._root.mkdir(parents=True, exist_ok=True)
        # Opened each time: two holders of one descriptor would not wait for each other.
        descriptor = os.open(self._root / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def make_room(self, sizes_bytes: Sequence[int], own: Path) -> list[bool]:
        """Which of some things may be written now, each whole; they count from then on.

        Call it under :meth:`locked`, and write them before the lock is let go of: what is not there yet is forgotten
        when all files are counted anew.

        Args:
            sizes_bytes: of entries with their records.
            own: the namespace's folder; others, if nobody uses them, go where they must, the oldest first.

        Raises:
            OSError: the disk.
        """
        used_bytes, num_bytes = self._read_count(), sum(sizes_bytes)
        if used_bytes + num_bytes > self._budget_bytes and self._looks_again(used_bytes):
            used_bytes = _size_bytes(self._root)
            used_bytes -= self._evict(used_bytes + num_bytes - self._budget_bytes, own)
        is_room: list[bool] = []
        for size_bytes in sizes_bytes:
            is_room.append(not size_bytes or used_bytes + size_bytes <= self._budget_bytes)
            used_bytes += size_bytes if is_room[-1] else 0
        if not all(is_room):
            self._num_refusals = self._num_refusals + 1 if used_bytes == self._refused_at_bytes else 1
            self._refused_at_bytes = used_bytes
        self._write_count(used_bytes)
        return is_room

    def _looks_again(self, used_bytes: int) -> bool:
        return used_bytes != self._refused_at_bytes or self._num_refusals % _REFUSALS_BETWEEN_COUNTS == 0

    def _evict(self, num_bytes: int, own: Path) -> int:
        """Remove namespaces that nobody uses until so many bytes are free; gives how many were."""
        freed_bytes = 0
        for folder in _oldest_first(path for path in self._root.iterdir() if path != own):
            if freed_bytes >= num_bytes:
                break
            with suppress(BlockingIOError, FileNotFoundError), (folder / _IN_USE_NAME).open("ab") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                size_bytes = _size_bytes(folder)
                shutil.rmtree(folder, ignore_errors=True)
                freed_bytes += size_bytes - _size_bytes(folder)
                logger.info("activation cache: %d bytes of another job were removed for this one's", size_bytes)
        return freed_bytes

    def _read_count(self) -> int:
        """Bytes that are there, or more."""
        with (self._root / _LOCK_NAME).open("rb") as file:
            content = file.read()
        if len(content) == _COUNT.size:
            return int(_COUNT.unpack(content)[0])
        return _size_bytes(self._root) + _COUNT.size

    def _write_count(self, used_bytes: int) -> None:
        with (self._root / _LOCK_NAME).open("r+b", buffering=0) as file:
            file.write(_COUNT.pack(used_bytes))


def mark_in_use(folder: Path) -> BinaryIO:
    """Keep a namespace from being removed until the result is closed; call it under :meth:`DiskBudget.locked`.

    Raises:
        OSError: the disk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    in_use = (folder / _IN_USE_NAME).open("ab")
    fcntl.flock(in_use, fcntl.LOCK_SH)
    os.utime(folder)
    return in_use


def _oldest_first(paths: Iterator[Path]) -> list[Path]:
    used_at_s: dict[Path, float] = {}
    for path in paths:
        with suppress(FileNotFoundError):
            status = path.stat()
            if path.is_dir():
                used_at_s[path] = status.st_mtime
    return sorted(used_at_s, key=lambda path: used_at_s[path])


def _size_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total
