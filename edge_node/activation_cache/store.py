"""Hidden states on a device's disk: append-only files, one pair for each kind of state, under one byte budget.

``<root>/<namespace>/<state>.data`` holds entries one after the other, ``.index`` a fixed record for each: key, place,
size, checksum. An entry is written before its record, so that a crash loses entries and never makes a wrong one; what
is damaged later is found by its checksum when it is asked for, and written anew behind the others. A namespace is
everything that the numbers follow from beside the sample: model, dtype, packing, codec.

Any number of workers and agents may use one folder, the same files too: what one wrote the others find, and nothing is
kept twice. Budget: an entry that does not fit is left out and counted; namespaces that no worker uses go first, the
oldest before the others (:mod:`edge_node.activation_cache.disk_budget`).
"""

from __future__ import annotations

import logging
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_node.activation_cache.disk_budget import DiskBudget, mark_in_use
from plutino.errors import AgentError

logger = logging.getLogger(__name__)

_RECORD = struct.Struct("<16sQII")
"""Key, offset, bytes, checksum."""
_ALIGNMENT_BYTES = 64
"""Entries begin at multiples of it: part of the format, for readers that map files and add up words where they lie."""
_NUM_FOLDS = 16
_PIECES_AT_ONCE = 512
"""Linux takes at most 1,024 in one call."""


class ActivationStore:
    """The activation caches of one folder; several stores may use it at once.

    Args:
        root: a folder of the caches' own.
        budget_bytes: bound on the bytes of all files below it, those of other stores included.
    """

    def __init__(self, root: Path, budget_bytes: int) -> None:
        self._root = root
        self._budget = DiskBudget(root, budget_bytes)

    def open(self, namespace: str, state: str) -> StateFile:
        """The entries of one kind of state.

        Raises:
            AgentError: the disk does not let them be opened.
        """
        try:
            return StateFile(self._budget, self._root / namespace, state)
        except OSError as error:
            raise AgentError(
                f"the activation cache cannot be used: {error.filename or self._root}: {error.strerror}; mend that, "
                "let --cache-dir name another folder, or start the agent with --activation-cache 0"
            ) from error

    @contextmanager
    def writing(self, namespace: str, sizes_bytes: Sequence[int]) -> Iterator[list[bool]]:
        """Keep all others from writing, and say which of some things there is room for, each whole.

        Args:
            namespace: where they go.
            sizes_bytes: of each, by :func:`billed_bytes` of its entries. What there is room for counts as written, and
                must be written before the context ends.
        """
        folder = self._root / namespace
        with ExitStack() as held:
            try:
                held.enter_context(self._budget.locked())
                is_room = self._budget.make_room(sizes_bytes, folder)
            except OSError as error:
                logger.warning("activation cache: %s cannot be written: %s", folder, error)
                is_room = [False] * len(sizes_bytes)
            yield is_room


class StateFile:
    """Entries of one kind of state; used by one thread."""

    def __init__(self, budget: DiskBudget, folder: Path, state: str) -> None:
        self._budget = budget
        self._folder = folder
        self._index_bytes = 0
        self._records: dict[bytes, tuple[int, int, int]] = {}
        self.is_writable = True
        """Until the disk refuses something."""
        with budget.locked():
            self._in_use = mark_in_use(folder)
            # Without buffers: nothing may reach a file when the lock is no longer held.
            self._data = (folder / f"{state}.data").open("ab+", buffering=0)
            self._index = (folder / f"{state}.index").open("ab+", buffering=0)
            self._read_index(is_locked=True)
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

    def size_bytes(self, key: bytes) -> int | None:
        """Bytes of an entry; None if it is not here."""
        record = self._find(key)
        return None if record is None else record[1]

    def read(self, key: bytes) -> NDArray[np.uint8] | None:
        """An entry's bytes; None if it is not here or damaged."""
        size_bytes = self.size_bytes(key)
        if size_bytes is None:
            return None
        data = np.empty(size_bytes, np.uint8)
        return data if self.read_into(data, key) else None

    def read_into(self, data: NDArray[np.uint8], key: bytes, *, is_checked: bool = False) -> bool:
        """Put an entry's bytes where there is room for as many; False if no such entry is here, or it is damaged.

        With ``is_checked`` the caller has just seen that it is intact.
        """
        record = self._find(key)
        if record is None:
            return False
        offset, num_bytes, checksum = record
        # Mapping an entry takes four times as long as copying one of 28 KB from the page cache, ten times of 1 KB.
        is_whole = num_bytes == len(data) == os.preadv(self._data.fileno(), [data.data], offset)
        if is_whole and (is_checked or _checksum(data) == checksum):
            return True
        self._forget(key)
        return False

    def write(self, key: bytes, data: NDArray[np.uint8]) -> bool:
        """Keep an entry, or find that another worker has kept it; False if the budget has no room for it."""
        if not self.is_writable:
            return False
        try:
            with self._budget.locked():
                self._read_index(is_locked=True)
                if key in self._records:
                    return True
                if not all(self._budget.make_room([billed_bytes(data.nbytes)], self._folder)):
                    return False
                self._append([(key, data)])
        except OSError as error:
            self._give_up(error)
        return self.is_writable

    def append(self, entries: Sequence[tuple[bytes, NDArray[np.uint8]]]) -> bool:
        """Keep entries for which there is room, under :meth:`ActivationStore.writing`; those that are here stay.

        Returns:
            False: the disk refuses them, and nothing is written here from now on.
        """
        if not self.is_writable:
            return False
        try:
            self._read_index(is_locked=True)
            self._append(list({key: data for key, data in entries if key not in self._records}.items()))
        except OSError as error:
            self._give_up(error)
        return self.is_writable

    def _give_up(self, error: OSError) -> None:
        logger.warning("activation cache: %s cannot be written: %s", self._data.name, error)
        self.is_writable = False

    def _append(self, entries: Sequence[tuple[bytes, NDArray[np.uint8]]]) -> None:
        end = os.fstat(self._data.fileno()).st_size
        pieces: list[memoryview] = []
        records: dict[bytes, tuple[int, int, int]] = {}
        for key, data in entries:
            gap_bytes = -end % _ALIGNMENT_BYTES
            pieces += [memoryview(bytes(gap_bytes)), data.data.cast("B")]
            records[key] = end + gap_bytes, data.nbytes, _checksum(data)
            end += gap_bytes + data.nbytes
        _append_all(self._data.fileno(), pieces)
        index = b"".join(_RECORD.pack(key, *record) for key, record in records.items())
        _append_all(self._index.fileno(), [memoryview(index)])
        self._records |= records
        self._index_bytes += len(index)

    def close(self) -> None:
        """Let go of files and locks."""
        for file in (self._data, self._index, self._in_use):
            with suppress(OSError):
                file.close()

    def _forget(self, key: bytes) -> None:
        self.num_damaged += 1
        del self._records[key]

    def _find(self, key: bytes) -> tuple[int, int, int] | None:
        if key not in self._records:
            # Another worker may have written it meanwhile.
            self._read_index()
        return self._records.get(key)

    def _read_index(self, *, is_locked: bool = False) -> None:
        """Learn whole new records in the order in which they were written: of several for a key the last counts.

        With ``is_locked`` nobody is writing: the beginning of a record is what a crash left, and goes.
        """
        num_bytes = os.fstat(self._index.fileno()).st_size - self._index_bytes
        content = os.pread(self._index.fileno(), num_bytes, self._index_bytes) if num_bytes > 0 else b""
        whole_bytes = len(content) // _RECORD.size * _RECORD.size
        self._index_bytes += whole_bytes
        if whole_bytes < len(content) and is_locked:
            os.ftruncate(self._index.fileno(), self._index_bytes)
        for key, offset, size, checksum in _RECORD.iter_unpack(content[:whole_bytes]):
            self._records[key] = offset, size, checksum


def billed_bytes(num_bytes: int) -> int:
    """What an entry of so many bytes takes of the budget, at most."""
    return num_bytes + _ALIGNMENT_BYTES - 1 + _RECORD.size


def _append_all(descriptor: int, pieces: Sequence[memoryview]) -> None:
    """Write at the end of a file; a disk that is nearly full may take a part before it refuses."""
    for start in range(0, len(pieces), _PIECES_AT_ONCE):
        left = list(pieces[start : start + _PIECES_AT_ONCE])
        while left:
            num_bytes = os.writev(descriptor, left)
            while left and num_bytes >= len(left[0]):
                num_bytes -= len(left.pop(0))
            if left:
                left[0] = left[0][num_bytes:]


def _checksum(data: NDArray[np.uint8]) -> int:
    """The crc32 of a sixteenth as many bytes: of the sums of words that far apart, and of what is left over.

    Added up they are checked ten times as fast as by a crc32 of all; a changed word always changes its sum.
    """
    num_words = data.nbytes // (8 * _NUM_FOLDS)
    words = data[: num_words * 8 * _NUM_FOLDS].view(np.uint64).reshape(_NUM_FOLDS, num_words)
    return zlib.crc32(data[words.nbytes :].data, zlib.crc32(np.add.reduce(words, axis=0).data))
