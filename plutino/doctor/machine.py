"""Probes of a machine: each gives a value and judges nothing. Nothing here imports torch.

Linux tells most of it under /proc and /sys, whose places are arguments for tests; elsewhere psutil tells less.
"""

from __future__ import annotations

import math
import os
import resource
import shutil
import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from plutino.errors import ConfigError

_NUM_SYNCS = 5
_SYNC_BYTES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of memory."""

    total_bytes: int
    available_bytes: int
    swap_bytes: int
    cgroup_limit_bytes: int | None
    """What the container or the service may take; None: as much as there is."""

    @property
    def usable_bytes(self) -> int:
        """The most that processes here can ever have."""
        return min(self.total_bytes, self.cgroup_limit_bytes or self.total_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Processor:
    """How much computing this process may do."""

    num_cores: int
    num_allowed: int
    """Cores of its affinity."""
    quota_cores: float | None
    """Processor time a second that its cgroup grants; None: no bound."""

    @property
    def useful_threads(self) -> int:
        """Threads beyond which a worker only waits for itself."""
        return min(self.num_allowed, math.ceil(self.quota_cores) if self.quota_cores else self.num_allowed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """A folder, or where it will be made."""

    path: Path
    free_bytes: int
    is_writable: bool
    sync_s: float | None
    """Median seconds of a write of 4 KiB with fsync; None where it was not tried."""


def read_memory(root: Path = Path("/")) -> Memory:
    """Memory of the machine and of the cgroup that this process is in."""
    virtual, swap = psutil.virtual_memory(), psutil.swap_memory()
    return Memory(
        total_bytes=virtual.total,
        available_bytes=virtual.available,
        swap_bytes=swap.total,
        cgroup_limit_bytes=_cgroup_memory_bytes(root),
    )


def read_processor(root: Path = Path("/")) -> Processor:
    """Cores, affinity and quota of this process."""
    num_cores = os.cpu_count() or 1
    num_allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else num_cores
    return Processor(num_cores=num_cores, num_allowed=num_allowed, quota_cores=_cgroup_quota(root))


def read_limits() -> dict[str, int | None]:
    """Soft resource limits by name; None where there is none."""
    names = ("NOFILE", "DATA", "AS", "NPROC", "STACK")
    soft = {name: resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))[0] for name in names}
    return {name: None if limit == resource.RLIM_INFINITY else limit for name, limit in soft.items()}


def read_disk(path: Path, *, tries_sync: bool = False) -> Disk:
    """Room at a folder; one that does not exist yet is judged by its nearest parent, and not made."""
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    is_writable = os.access(existing, os.W_OK | os.X_OK)
    return Disk(
        path=path,
        free_bytes=shutil.disk_usage(existing).free,
        is_writable=is_writable,
        sync_s=_sync_s(existing) if tries_sync and is_writable else None,
    )


def sqlite_damage(path: Path) -> str | None:
    """What SQLite's own check says of a database, also of one that is in use; None if it is sound or does not exist."""
    if not path.exists():
        return None
    try:
        connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=5.0)
        try:
            said = connection.execute("PRAGMA quick_check(3)").fetchall()
        finally:
            connection.close()
    except sqlite3.Error as error:
        return str(error)
    lines = [str(row[0]) for row in said]
    return None if lines == ["ok"] else "; ".join(lines)


def _sync_s(folder: Path) -> float:
    path = folder / f".plutino-doctor-{os.getpid()}"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise ConfigError(f"cannot write into {folder}: {error.strerror}") from error
    taken_s = []
    try:
        for _ in range(_NUM_SYNCS):
            started_s = time.perf_counter()
            os.pwrite(descriptor, bytes(_SYNC_BYTES), 0)
            os.fsync(descriptor)
            taken_s.append(time.perf_counter() - started_s)
    finally:
        os.close(descriptor)
        path.unlink()
    return sorted(taken_s)[_NUM_SYNCS // 2]


def _cgroup_memory_bytes(root: Path) -> int | None:
    limits = [_integer(folder / "memory.max") for folder in _cgroup_folders(root, "")]
    limits += [_integer(folder / "memory.limit_in_bytes") for folder in _cgroup_folders(root, "memory")]
    # Version 1 writes "no limit" as the largest number of whole pages.
    set_limits = [limit for limit in limits if limit is not None and limit < 1 << 60]
    return min(set_limits, default=None)


def _cgroup_quota(root: Path) -> float | None:
    found = []
    for folder in _cgroup_folders(root, ""):
        quota, _, period = _read(folder / "cpu.max").partition(" ")
        if quota.isdigit() and period.strip().isdigit():
            found.append(int(quota) / int(period))
    for folder in _cgroup_folders(root, "cpu"):
        quota_us, period_us = _integer(folder / "cpu.cfs_quota_us"), _integer(folder / "cpu.cfs_period_us")
        if quota_us is not None and quota_us > 0 and period_us:
            found.append(quota_us / period_us)
    return min(found, default=None)


def _cgroup_folders(root: Path, controller: str) -> list[Path]:
    """The cgroup of this process and those above it; ``controller`` is empty for version 2."""
    mount = root / "sys/fs/cgroup" / controller
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, place = rest.partition(":")
        is_it = number == "0" if not controller else controller in controllers.split(",")
        if is_it:
            inner = mount / place.lstrip("/")
            # Inside a container the place is often named as the host sees it: then only the mount itself is there.
            return [folder for folder in (inner, *inner.parents) if folder.is_relative_to(mount) and folder.exists()]
    return []


def _integer(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.lstrip("-").isdigit() else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
