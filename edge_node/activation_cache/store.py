"""Hidden states on a device's disk: append-only files, one pair for each kind of state, under one byte budget.

``<root>/<namespace>/<state>.data`` holds entries one after the other, ``.index`` a fixed record for each: key, place,
size, checksum. An entry is written before its record, so that a crash loses entries and never makes a wrong one; what
is damaged later is found by its checksum when it is asked for, and written anew behind the others. A namespace is
everything that the numbers follow from beside the sample: model, dtype, packing, codec.

Budget: an entry that does not fit is left out and counted; namespaces that no worker uses go first, the oldest before
the others.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import shutil
import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

_RECORD = struct.Struct("<16sQII")
"""Key, offset, bytes, checksum."""
_ALIGNMENT_BYTES = 64
"""Entries begin at multiples of it, so that their words can be added up where they lie."""
_NUM_FOLDS = 16
_LOCK_NAME = "in-use"


class ActivationStore:
    """The activation caches of one device.

    Args:
        root: a folder of the cache's own.
        budget_bytes: bound on the bytes of all files below it.
    """

    def __init__(self, root: Path, budget_bytes: int) -> None:
        self._root = root
        self._budget_bytes = budget_bytes
        self._used_bytes = 0
        self._uncounted_bytes = budget_bytes + 1

    def open(self, namespace: str, state: str) -> StateFile:
        """The entries of one kind of state, for reading, and for writing where no other worker does."""
        return StateFile(self, self._root / namespace, state)

    def make_room(self, num_bytes: int, own: Path) -> bool:
        """Whether so many bytes may be written now; other namespaces go where they must."""
        if self._uncounted_bytes > self._budget_bytes // 64:
            # Other workers of the device write too.
            self._used_bytes, self._uncounted_bytes = _size_bytes(self._root), 0
        if self._used_bytes + num_bytes > self._budget_bytes:
            self._evict(self._used_bytes + num_bytes - self._budget_bytes, own)
        if self._used_bytes + num_bytes > self._budget_bytes:
            return False
        self._used_bytes += num_bytes
        self._uncounted_bytes += num_bytes
        return True

    def _evict(self, num_bytes: int, own: Path) -> None:
        others = [path for path in self._root.iterdir() if path.is_dir() and path != own]
        for folder in sorted(others, key=lambda path: path.stat().st_mtime):
            if num_bytes <= 0:
                return
            size_bytes = _size_bytes(folder)
            with (folder / _LOCK_NAME).open("ab") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                shutil.rmtree(folder, ignore_errors=True)
            logger.info("activation cache: %d bytes of another job were removed for this one's", size_bytes)
            num_bytes -= size_bytes
            self._used_bytes -= size_bytes


class StateFile:
    """Entries of one kind of state; used by one thread."""

    def __init__(self, store: ActivationStore, folder: Path, state: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._store = store
        self._folder = folder
        self._in_use = (folder / _LOCK_NAME).open("ab")
        fcntl.flock(self._in_use, fcntl.LOCK_SH)
        os.utime(folder)
        self._data: BinaryIO = (folder / f"{state}.data").open("ab+")
        self._index: BinaryIO = (folder / f"{state}.index").open("ab+")
        self.is_writable = True
        try:
            fcntl.flock(self._data, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.is_writable = False
        self._index_bytes = 0
        self._records: dict[bytes, tuple[int, int, int]] = dict(self._read_index())
        self.num_damaged = 0
        """Entries whose checksum was wrong when they were asked for."""

    def __len__(self) -> int:
        return len(self._records)

    def holds(self, key: bytes) -> bool:
        """Whether an entry is here and intact; a damaged one is forgotten."""
        return self.read(key) is not None

    def has(self, key: bytes) -> bool:
        """Whether an entry was written here; whether it is intact is seen when it is read."""
        return self._find(key) is not None

    def read(self, key: bytes, *, is_checked: bool = False) -> NDArray[np.uint8] | None:
        """An entry's bytes, mapped from the file; None if it is not here or damaged.

        Writing to them changes nobody else's. With ``is_checked`` the caller has just seen that it is intact.
        """
        record = self._find(key)
        if record is None:
            return None
        offset, num_bytes, checksum = record
        if offset + num_bytes > os.fstat(self._data.fileno()).st_size:
            self._forget(key)
            return None
        # Each entry by itself: pages of a mapping count as the worker's memory for as long as it stands.
        start = offset % mmap.ALLOCATIONGRANULARITY
        mapped = mmap.mmap(self._data.fileno(), start + num_bytes, access=mmap.ACCESS_COPY, offset=offset - start)
        data = np.frombuffer(mapped, np.uint8, num_bytes, start)
        if is_checked or _checksum(data) == checksum:
            return data
        self._forget(key)
        return None

    def write(self, key: bytes, data: NDArray[np.uint8]) -> bool:
        """Keep an entry; False if the budget has no room for it, or another worker writes here."""
        if not self.is_writable:
            return False
        end = self._data.seek(0, os.SEEK_END)
        gap_bytes = -end % _ALIGNMENT_BYTES
        if not self._store.make_room(gap_bytes + data.nbytes + _RECORD.size, self._folder):
            return False
        offset, checksum = end + gap_bytes, _checksum(data)
        try:
            self._data.write(bytes(gap_bytes))
            self._data.write(data.data)
            self._data.flush()
            self._index.write(_RECORD.pack(key, offset, data.nbytes, checksum))
            self._index.flush()
        except OSError as error:
            logger.warning("activation cache: %s cannot be written: %s", self._data.name, error)
            self.is_writable = False
            return False
        self._records[key] = offset, data.nbytes, checksum
        return True

    def close(self) -> None:
        """Let go of files and locks."""
        for file in (self._data, self._index, self._in_use):
            with suppress(OSError):
                file.close()

    def _forget(self, key: bytes) -> None:
        self.num_damaged += 1
        del self._records[key]

    def _find(self, key: bytes) -> tuple[int, int, int] | None:
        if key not in self._records and not self.is_writable:
            # Another worker of this device writes here, and may have written this one meanwhile.
            self._records |= dict(self._read_index())
        return self._records.get(key)

    def _read_index(self) -> Iterator[tuple[bytes, tuple[int, int, int]]]:
        """Whole new records in the order in which they were written: of several for a key the last counts."""
        self._index.seek(self._index_bytes)
        content = self._index.read()
        whole_bytes = len(content) // _RECORD.size * _RECORD.size
        self._index_bytes += whole_bytes
        if whole_bytes < len(content) and self.is_writable:
            self._index.truncate(self._index_bytes)  # the end of a record that a crash cut off
        for key, offset, num_bytes, checksum in _RECORD.iter_unpack(content[:whole_bytes]):
            yield key, (offset, num_bytes, checksum)


def _checksum(data: NDArray[np.uint8]) -> int:
    """The crc32 of a sixteenth as many bytes: of the sums of words that far apart, and of what is left over.

    Added up they are checked ten times as fast as by a crc32 of all; a changed word always changes its sum.
    """
    num_words = data.nbytes // (8 * _NUM_FOLDS)
    words = data[: num_words * 8 * _NUM_FOLDS].view(np.uint64).reshape(_NUM_FOLDS, num_words)
    return zlib.crc32(data[words.nbytes :].data, zlib.crc32(np.add.reduce(words, axis=0).data))


def _size_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total
