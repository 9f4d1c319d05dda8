"""What a disk cache hands out: blobs being received, and keys that a live process uses.

Made by :class:`edge_node.cache.BlobCache`; both hold a flock, which the kernel lets go of however the process ends.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

from plutino.errors import AgentError, FrameError

Buffer = bytes | bytearray | memoryview

CHUNK_BYTES = 1 << 20
"""Files are read and hashed in pieces of this size."""


class Pin:
    """Keys that a live process uses. Thread-safe as far as :meth:`close` is called once."""

    def __init__(self, path: Path, keys: Iterable[str], locked: Callable[[], AbstractContextManager[None]]) -> None:
        self._locked = locked
        self._path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        self._write(keys)

    def __enter__(self) -> Pin:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def add(self, keys: Iterable[str]) -> None:
        """Keep further blobs."""
        with self._locked():
            self._write(keys)

    def close(self) -> None:
        """Let the blobs be evicted again."""
        self._path.unlink(missing_ok=True)
        os.close(self._descriptor)

    def _write(self, keys: Iterable[str]) -> None:
        write_all(self._descriptor, memoryview("".join(f"{key}\n" for key in keys).encode("ascii")))


class Incoming:
    """A blob being received. What is written before an error stays, and the next one goes on from there."""

    def __init__(self, key: str, total_bytes: int, part: Path, blob: Path, descriptor: int) -> None:
        self.key = key
        self.total_bytes = total_bytes
        self.path: Path | None = None
        """The whole blob: there from the beginning if somebody else has received it meanwhile."""
        self._part = part
        self._blob = blob
        self._descriptor = descriptor
        self._hash = hashlib.sha256()
        self.received_bytes = 0
        """What is here already; the next byte to write."""

    def __enter__(self) -> Incoming:
        try:
            if self._blob.exists():
                self._part.unlink(missing_ok=True)
                self.path = self._blob
            else:
                self.received_bytes = hash_into(self._hash, self._descriptor)
                if self.received_bytes > self.total_bytes:
                    self.restart()
        except BaseException:
            os.close(self._descriptor)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    def write(self, data: Buffer) -> None:
        """Append a piece.

        Raises:
            FrameError: more came than the blob has.
            AgentError: the disk is full or fails; a full disk gets back what this blob took.
        """
        view = memoryview(data).cast("B")
        if self.received_bytes + len(view) > self.total_bytes:
            raise FrameError(f"{self.key[:12]}: more than its {self.total_bytes} bytes came")
        try:
            write_all(self._descriptor, view)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                self.restart()
            raise disk_error(error, self._part) from error
        self._hash.update(view)
        self.received_bytes += len(view)

    def restart(self) -> None:
        """Drop what was received."""
        os.ftruncate(self._descriptor, 0)
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        self._hash = hashlib.sha256()
        self.received_bytes = 0

    def publish(self) -> Path:
        """Check the content and give it its name.

        Raises:
            FrameError: bytes are missing (what is here is kept), or they are not the named ones (they are dropped).
        """
        if self.received_bytes != self.total_bytes:
            raise FrameError(f"{self.key[:12]}: {self.received_bytes} of {self.total_bytes} bytes came")
        found = self._hash.hexdigest()
        if found != self.key:
            self.restart()
            raise FrameError(f"{self.total_bytes} bytes came with sha256 {found[:12]}, expected {self.key[:12]}")
        try:
            self._blob.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.replace(self._part, self._blob)
        except OSError as error:
            raise disk_error(error, self._blob) from error
        self.path = self._blob
        return self._blob


def write_all(descriptor: int, view: memoryview) -> None:
    """Write the whole view at the descriptor's place."""
    while view:
        view = view[os.write(descriptor, view) :]


def hash_into(digest: hashlib._Hash, descriptor: int) -> int:
    """Feed a file to a hash; returns its bytes and leaves the descriptor at its end."""
    os.lseek(descriptor, 0, os.SEEK_SET)
    num_bytes = 0
    while piece := os.read(descriptor, CHUNK_BYTES):
        digest.update(piece)
        num_bytes += len(piece)
    return num_bytes


def is_locked(path: Path) -> bool:
    """Whether somebody alive holds the file."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)


def disk_error(error: OSError, path: Path) -> AgentError:
    """What a failed file operation of the cache means for the device's owner."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return AgentError(
            f"the disk is full while {path} is written; free some space, or let --cache-dir name another disk"
        )
    return AgentError(
        f"the weights cache cannot be used: {path}: {error.strerror}; mend that, or let --cache-dir name another folder"
    )
