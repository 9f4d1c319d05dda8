"""The device's disk cache: blobs named by their sha256, under a byte budget, shared by all workers of an agent.

Layout below the root::

    blobs/<2>/<sha256>     whole; checked when it was written, and whenever :meth:`BlobCache.check` is asked
    parts/<sha256>.<size>  being received, locked by whoever receives it; what a dead process left is gone on with
    names/<2>/<name>       sha256 of what was made from the named inputs (see :meth:`BlobCache.put`)
    pins/<random>          keys that a live process uses, locked by that process
    lock                   held while room is made or a pin is written

All locks are flocks, so the kernel lets go of them however a process ends. Nothing is synced: a power cut may leave a
blob of other bytes, which the check finds. What is evicted first is what was used longest ago.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from edge_node.cache_entries import Buffer, Incoming, Pin, disk_error, hash_into, is_locked
from plutino.errors import AgentError
from plutino.sizes import GIB, format_size

DEFAULT_BUDGET_BYTES = 32 * GIB
_KEY = re.compile(r"[0-9a-f]{64}", re.ASCII)
_POLL_S = 0.05
_STALLED_AFTER_S = 120.0
"""Somebody else's download that has not grown for so long is not waited for any more."""
_DISK_RESERVE_BYTES = 64 << 20
"""What is left free on the disk: logs and the training state must still be written."""


class OverBudgetError(AgentError):
    """A blob does not fit the cache beside what running jobs use."""


def default_cache_dir() -> Path:
    """Where this user's weights are cached, by the XDG rules."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "plutino" / "weights"


class BlobCache:
    """Blobs by sha256, for any number of processes and threads at once.

    Args:
        root: folder of the cache; made when the first blob comes.
        budget_bytes: bound on all blobs and unfinished downloads together; 0 caches nothing.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        root: Path,
        budget_bytes: int = DEFAULT_BUDGET_BYTES,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self.root = root
        self.budget_bytes = budget_bytes
        self._clock = clock
        self._sleep = sleep

    def find(self, key: str) -> Path | None:
        """Path of a blob that is here, which counts as a use; None if it is not. Its bytes are not looked at."""
        path = self._blob_path(key)
        try:
            os.utime(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise disk_error(error, path) from error
        return path

    def check(self, key: str) -> Path | None:
        """Path of a blob whose bytes have just been found right; one whose bytes are others is removed."""
        path = self.find(key)
        if path is None:
            return None
        try:
            with path.open("rb", buffering=0) as file:
                digest = hashlib.sha256()
                hash_into(digest, file.fileno())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise disk_error(error, path) from error
        if digest.hexdigest() != key:
            path.unlink(missing_ok=True)
            return None
        return path

    def remove(self, key: str) -> None:
        """Forget a blob; an unknown one is harmless."""
        self._blob_path(key).unlink(missing_ok=True)

    def pin(self, keys: Iterable[str] = ()) -> Pin:
        """Keep blobs from eviction until the result is closed or this process ends; they need not be here yet."""
        with self._locked():
            return Pin(self.root / "pins" / uuid.uuid4().hex, keys, self._locked)

    def receive(self, key: str, total_bytes: int) -> Incoming:
        """Begin or go on to receive a blob; use the result within ``with``.

        Waits while another process or thread receives the same blob, so that it comes once.

        Raises:
            OverBudgetError: there is no room beside what running jobs use, or the other one's download stalls.
            AgentError: the disk has no room or fails.
        """
        blob, part = self._blob_path(key), self.root / "parts" / f"{key}.{total_bytes}"
        self._make_room(part, total_bytes)
        try:
            descriptor = self._lock_part(part, blob)
        except OSError as error:
            raise disk_error(error, part) from error
        return Incoming(key, total_bytes, part, blob, descriptor)

    def put(self, name: str, pieces: Sequence[Buffer]) -> str:
        """Store what was made from named inputs, such as a packed matrix; returns the sha256 of the content.

        Args:
            name: 64 hexadecimal digits, the hash of everything that the content follows from, its format included.
            pieces: the content, in consecutive pieces.

        Raises:
            OverBudgetError: there is no room beside what running jobs use.
            AgentError: the disk has no room or fails.
        """
        digest = hashlib.sha256()
        for piece in pieces:
            digest.update(piece)
        key = digest.hexdigest()
        with self.receive(key, sum(memoryview(piece).nbytes for piece in pieces)) as incoming:
            if incoming.path is None:
                incoming.restart()
                for piece in pieces:
                    incoming.write(piece)
                incoming.publish()
        path = self._name_path(name)
        temporary = path.with_name(f".{uuid.uuid4().hex}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(key, encoding="ascii")
            os.replace(temporary, path)
        except OSError as error:
            raise disk_error(error, path) from error
        return key

    def lookup(self, name: str) -> Path | None:
        """Path of what was stored under a name, its bytes checked; None if it is not here (any more)."""
        path = self._name_path(name)
        try:
            key = path.read_text(encoding="ascii")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError):
            key = ""
        found = self.check(key) if _KEY.fullmatch(key) else None
        if found is None:
            path.unlink(missing_ok=True)
        return found

    def has_name(self, name: str) -> bool:
        """Whether something lies here under a name; its bytes are not looked at."""
        try:
            key = self._name_path(name).read_text(encoding="ascii")
        except (OSError, UnicodeDecodeError):
            return False
        return bool(_KEY.fullmatch(key)) and self._blob_path(key).is_file()

    def used_bytes(self) -> int:
        """Bytes of all blobs and, at their full size, of all unfinished downloads."""
        return sum(item.num_bytes for item in self._items())

    # Private: room.

    def _make_room(self, part: Path, total_bytes: int) -> None:
        with self._locked():
            items = [item for item in self._items() if item.path != part]
            missing_bytes = sum(item.num_bytes for item in items) + total_bytes - self.budget_bytes
            # Bytes of this part that lie on the disk already are no longer among the free ones.
            here_bytes = part.stat().st_size if part.exists() else 0
            free_bytes = shutil.disk_usage(self.root).free - _DISK_RESERVE_BYTES
            lacking_bytes = max(missing_bytes, total_bytes - here_bytes - free_bytes)
            if lacking_bytes <= 0:
                part.touch(mode=0o600)  # counted from now on
                return
            pinned = self._pinned()
            victims = sorted(
                (item for item in items if item.key not in pinned and not (item.is_part and is_locked(item.path))),
                key=lambda item: item.used_at_s,
            )
            if missing_bytes > sum(item.num_bytes for item in victims):
                raise OverBudgetError(
                    f"{format_size(total_bytes)} do not fit the weights cache {self.root} of "
                    f"{format_size(self.budget_bytes)}: running jobs use the rest; give it more with --cache"
                )
            for victim in victims:
                if lacking_bytes <= 0:
                    break
                victim.path.unlink(missing_ok=True)
                lacking_bytes -= victim.num_bytes
            free_bytes = shutil.disk_usage(self.root).free - _DISK_RESERVE_BYTES
            if total_bytes - here_bytes > free_bytes:
                raise AgentError(
                    f"the disk of {self.root} has {format_size(max(0, free_bytes))} to give, a tensor needs "
                    f"{format_size(total_bytes)}; free some, or let --cache-dir name another disk"
                )
            part.touch(mode=0o600)

    def _items(self) -> list[_Item]:
        found: dict[str, _Item] = {}
        # Downloads first: one that is published between the two lists is then in both rather than in neither.
        for path in [*(self.root / "parts").glob("*"), *(self.root / "blobs").glob("*/*")]:
            key, _, size_text = path.name.partition(".")
            if not _KEY.fullmatch(key):
                continue
            status = _status(path)
            if status is None and size_text:
                # Published since the blobs were listed, and then it is not among them.
                path, size_text = self._blob_path(key), ""
                status = _status(path)
            if status is not None:
                num_bytes = int(size_text) if size_text.isdecimal() else status.st_size
                found[key] = _Item(path, key, num_bytes, status.st_mtime, is_part=bool(size_text))
        return list(found.values())

    def _pinned(self) -> set[str]:
        """Keys that live processes use; what dead ones left is removed."""
        pinned: set[str] = set()
        for path in (self.root / "pins").glob("*"):
            if is_locked(path):
                pinned.update(path.read_text(encoding="ascii").split())
            else:
                path.unlink(missing_ok=True)
        return pinned

    def _lock_part(self, part: Path, blob: Path) -> int:
        """A descriptor of the part file, which this caller alone holds."""
        last_size_bytes, last_growth_s = -1, self._clock()
        while True:
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Whoever held it before may have renamed or removed it: then this is no longer the file of that name.
                if blob.exists() or (part.exists() and os.path.samestat(os.fstat(descriptor), part.stat())):
                    return descriptor
            except BlockingIOError:
                size_bytes = os.fstat(descriptor).st_size
                if size_bytes != last_size_bytes:
                    last_size_bytes, last_growth_s = size_bytes, self._clock()
                elif self._clock() - last_growth_s > _STALLED_AFTER_S:
                    os.close(descriptor)
                    raise OverBudgetError(
                        f"another worker's download of {part.name} has not grown for {_STALLED_AFTER_S:.0f} s"
                    ) from None
                self._sleep(_POLL_S)
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            for name in ("blobs", "parts", "pins", "names"):
                (self.root / name).mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                yield
            finally:
                os.close(descriptor)
        except OSError as error:
            raise disk_error(error, self.root) from error

    def _blob_path(self, key: str) -> Path:
        assert _KEY.fullmatch(key), f"{key[:80]!r} is no sha256"
        return self.root / "blobs" / key[:2] / key

    def _name_path(self, name: str) -> Path:
        assert _KEY.fullmatch(name), f"{name[:80]!r} is no hash of inputs"
        return self.root / "names" / name[:2] / name


@dataclass(frozen=True, slots=True)
class _Item:
    path: Path
    key: str
    num_bytes: int
    used_at_s: float
    is_part: bool


def _status(path: Path) -> os.stat_result | None:
    """What the file system knows of a file; None if it is gone."""
    try:
        return path.stat()
    except FileNotFoundError:
        return None
