"""Shadows on disk: the training state of some parameters after a committed step, one safetensors file each.

Layout below the state directory::

    jobs/<job_id>/shadows/<shadow_id>.safetensors     whole, synced, its sha256 was checked
    jobs/<job_id>/shadows/.<shadow_id>.<random>.part  being received; swept when the bulk process starts

A shadow is immutable: an id that exists is never overwritten with other bytes, because a durable step may stand on it.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Collection
from pathlib import Path
from types import TracebackType

from plutino.errors import ConfigError, FrameError, JobError, UnknownJobError
from plutino.sizes import format_size

CHUNK_BYTES = 1 << 20
"""Files are read and hashed in pieces of this size."""

_ENDING = ".safetensors"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)


def check_name(kind: str, name: str) -> str:
    """Return a job id or shadow id that is safe as a file name.

    Raises:
        ConfigError: it is empty, longer than 128 characters, starts with a dot or holds anything but letters,
            digits, dot, dash and underscore.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{kind} {name[:140]!r} is not allowed; use 1 to 128 letters, digits, '.', '-' or '_', "
            "the first a letter or digit"
        )
    return name


class ShadowStore:
    """The shadows of all jobs below one state directory. Thread-safe."""

    def __init__(self, state_dir: Path) -> None:
        self._state_dir = state_dir
        self._publishing = threading.Lock()

    @property
    def state_dir(self) -> Path:
        """The coordinator's own folder."""
        return self._state_dir

    def job_dir(self, job_id: str) -> Path:
        """Folder of a job; it need not exist."""
        return self._state_dir / "jobs" / check_name("job id", job_id)

    def shadow_path(self, job_id: str, shadow_id: str) -> Path:
        """Where a shadow lies or would lie."""
        return self._shadow_dir(job_id) / f"{check_name('shadow id', shadow_id)}{_ENDING}"

    def list_shadows(self, job_id: str) -> tuple[str, ...]:
        """Ids of a job's whole shadows, sorted."""
        folder = self._shadow_dir(job_id)
        if not folder.is_dir():
            return ()
        names = (path.name for path in folder.iterdir())
        return tuple(
            sorted(name.removesuffix(_ENDING) for name in names if name.endswith(_ENDING) and not name.startswith("."))
        )

    def verify(self, job_id: str, shadow_id: str, sha256: str) -> Path:
        """Path of a shadow whose bytes have been read and have this sha256.

        Raises:
            UnknownJobError: there is no such shadow.
            FrameError: its bytes are others.
        """
        path = self.existing_path(job_id, shadow_id)
        found = file_sha256(path)
        if found != sha256:
            raise FrameError(
                f"shadow {shadow_id} of job {job_id} has sha256 {found}, expected {sha256}: {path} was changed or "
                "the disk is failing; the job must return to an older durable step"
            )
        return path

    def existing_path(self, job_id: str, shadow_id: str) -> Path:
        """Path of a shadow that is there.

        Raises:
            UnknownJobError: there is no such shadow.
        """
        path = self.shadow_path(job_id, shadow_id)
        if not path.is_file():
            num_shadows = len(self.list_shadows(job_id))
            raise UnknownJobError(f"job {job_id} has no shadow {shadow_id}; it has {num_shadows} others")
        return path

    def receive(self, job_id: str, shadow_id: str, sha256: str, total_bytes: int) -> IncomingShadow:
        """Begin to store a shadow; write to the result within ``with`` and publish it.

        Raises:
            ConfigError: a name or the sha256 is malformed.
            JobError: the disk has no room for it.
        """
        path = self.shadow_path(job_id, shadow_id)
        if not _SHA256.fullmatch(sha256):
            raise ConfigError(f"sha256 {sha256[:80]!r} of shadow {shadow_id} is not 64 lower-case hexadecimal digits")
        _make_durable_dir(path.parent)
        free_bytes = shutil.disk_usage(path.parent).free
        if total_bytes > free_bytes:
            raise JobError(
                f"shadow {shadow_id} of job {job_id} needs {format_size(total_bytes)}, the disk of {path.parent} has "
                f"{format_size(free_bytes)} free; free some, or shadow less often"
            )
        return IncomingShadow(path, sha256, total_bytes, self._publishing)

    def holds(self, job_id: str, shadow_id: str, sha256: str) -> bool:
        """Whether the shadow is stored already.

        Raises:
            JobError: a shadow of this id but with other bytes is.
        """
        path = self.shadow_path(job_id, shadow_id)
        return path.is_file() and _refuse_other_bytes(path, sha256)

    def delete(self, job_id: str, shadow_ids: Collection[str]) -> None:
        """Remove shadows that no row names any more; unknown ids are harmless."""
        for shadow_id in shadow_ids:
            self.shadow_path(job_id, shadow_id).unlink(missing_ok=True)

    def delete_job(self, job_id: str) -> None:
        """Remove all shadows of a job; nothing happens if there are none."""
        folder = self._shadow_dir(job_id)
        if folder.is_dir():
            shutil.rmtree(folder)
            _sync_dir(folder.parent)

    def keep(self, job_id: str, shadow_ids: Collection[str]) -> tuple[str, ...]:
        """Remove all shadows of a job but these; returns the ids removed, sorted."""
        removed = tuple(name for name in self.list_shadows(job_id) if name not in shadow_ids)
        for shadow_id in removed:
            self.shadow_path(job_id, shadow_id).unlink(missing_ok=True)
        if removed:
            _sync_dir(self._shadow_dir(job_id))
        return removed

    def sweep(self) -> int:
        """Remove what an earlier process left half received; returns how many files. No upload may be running."""
        leftovers = list(self._state_dir.glob("jobs/*/shadows/.*.part"))
        for path in leftovers:
            path.unlink()
        return len(leftovers)

    def _shadow_dir(self, job_id: str) -> Path:
        return self.job_dir(job_id) / "shadows"


class IncomingShadow:
    """A shadow being received. Leaving ``with`` before :meth:`publish` has returned leaves nothing behind."""

    def __init__(self, path: Path, sha256: str, total_bytes: int, publishing: threading.Lock) -> None:
        self._path = path
        self._sha256 = sha256
        self._total_bytes = total_bytes
        self._publishing = publishing
        self._received_bytes = 0
        self._hash = hashlib.sha256()
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=".part")
        self._part = Path(name)
        self._file = os.fdopen(descriptor, "wb")

    def __enter__(self) -> IncomingShadow:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        # Gone already if it was published, which renames it.
        self._part.unlink(missing_ok=True)

    def write(self, data: bytes) -> None:
        """Append a piece.

        Raises:
            FrameError: more came than was announced.
        """
        self._received_bytes += len(data)
        if self._received_bytes > self._total_bytes:
            raise FrameError(f"{self._path.stem}: more than the announced {self._total_bytes} bytes came")
        self._hash.update(data)
        self._file.write(data)

    def publish(self) -> None:
        """Check, sync and name the file; when this returns the shadow survives a power cut.

        Raises:
            FrameError: bytes are missing or the sha256 differs.
            JobError: a shadow of this id with other bytes exists.
        """
        if self._received_bytes != self._total_bytes:
            raise FrameError(
                f"shadow {self._path.stem} ended after {self._received_bytes} of {self._total_bytes} bytes; "
                "send it again"
            )
        if self._hash.hexdigest() != self._sha256:
            raise FrameError(
                f"shadow {self._path.stem} arrived with sha256 {self._hash.hexdigest()}, announced was {self._sha256}; "
                "send it again"
            )
        self._file.flush()
        os.fsync(self._file.fileno())
        with self._publishing:
            if self._path.is_file() and _refuse_other_bytes(self._path, self._sha256):
                return
            self._part.rename(self._path)
        _sync_dir(self._path.parent)


def file_sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _refuse_other_bytes(path: Path, sha256: str) -> bool:
    found = file_sha256(path)
    if found != sha256:
        raise JobError(
            f"shadow {path.stem} exists with sha256 {found} and is not replaced by one with {sha256}; "
            "an id names one content, so it must contain the plan epoch and the step"
        )
    return True


def _make_durable_dir(folder: Path) -> None:
    """Make a folder and its parents so that their names survive a power cut."""
    if folder.is_dir():
        return
    _make_durable_dir(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync_dir(folder.parent)


def _sync_dir(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
