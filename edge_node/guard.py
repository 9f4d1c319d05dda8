"""Memory limits of one process, and what processes use.

Two nets hold a worker inside its budget. In the worker, :func:`limit_data_segment` makes an allocation beyond the
budget fail, which torch turns into an exception with a stack. In the agent, :func:`read_usage` sees what that limit
does not count (touched file mappings, memory of the kernel on the process's behalf), and the agent ends the worker.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from plutino.errors import OutOfMemoryError
from plutino.sizes import KIB, MIB, SMALLEST_MAPPING_BYTES, format_size

logger = logging.getLogger(__name__)

THREAD_STACK_BYTES = 2 * MIB
"""Soft stack limit under which workers start: glibc maps that much for every thread of theirs."""

STACK_SLACK_BYTES = 32 * THREAD_STACK_BYTES
"""Data segment granted beyond the budget: stacks of 32 threads, mapped whole but hardly touched."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessUsage:
    """What a process uses now, and the most it ever had resident."""

    rss_bytes: int
    peak_rss_bytes: int
    cpu_seconds: float


def read_usage(pid: int) -> ProcessUsage | None:
    """Usage of a process; None if it has ended, reaped or not."""
    if not _proc_is_mounted():
        return _read_usage_by_psutil(pid)
    try:
        status = _read_status(Path(f"/proc/{pid}/status"))
        cpu_seconds = _read_cpu_seconds(Path(f"/proc/{pid}/stat"))
    except (FileNotFoundError, ProcessLookupError):
        return None
    if "VmRSS" not in status:
        # A zombie: its memory is given back, only its exit code is left.
        return None
    rss_bytes = status["VmRSS"]
    return ProcessUsage(
        rss_bytes=rss_bytes, peak_rss_bytes=max(rss_bytes, status.get("VmHWM", 0)), cpu_seconds=cpu_seconds
    )


def resident_bytes() -> int:
    """Resident memory of the calling process."""
    usage = read_usage(os.getpid())
    assert usage is not None, "the calling process runs"
    return usage.rss_bytes


def reset_peak() -> None:
    """Let this process's peak of resident memory count from now on, where the kernel can."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError as error:
        logger.info("the peak of resident memory goes on from the job before: %s", error.strerror)


def peak_resident_bytes() -> int:
    """The most resident memory that the calling process had, since :func:`reset_peak` if that was called."""
    usage = read_usage(os.getpid())
    assert usage is not None, "the calling process runs"
    return usage.peak_rss_bytes


def data_segment_limit(budget_bytes: int, rss_bytes: int, data_bytes: int, untouched_bytes: int = 0) -> int:
    """RLIMIT_DATA under which resident memory can grow from ``rss_bytes`` to ``budget_bytes`` and not further.

    The limit counts writable private mappings, touched or not, so it is set relative to what is mapped already:
    what the imports mapped and never touched is no part of the budget, nor is what stacks map and hardly touch.

    Args:
        budget_bytes: of resident memory.
        rss_bytes: what is resident now.
        data_bytes: what the limit counts now.
        untouched_bytes: what will be mapped besides, and never touched.

    Raises:
        OutOfMemoryError: the budget is spent already.
    """
    if rss_bytes >= budget_bytes:
        raise OutOfMemoryError(
            f"the worker holds {format_size(rss_bytes)} before any job, its memory budget is "
            f"{format_size(budget_bytes)}; give the device more memory"
        )
    return data_bytes + (budget_bytes - rss_bytes) + STACK_SLACK_BYTES + untouched_bytes


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_heap(*, is_kept: bool = True) -> None:
    """Let glibc serve blocks of up to 32 MiB from the heap and keep what is freed, from now on; or no longer.

    A step allocates the same sizes as the one before; on the heap their pages are not faulted in anew.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 * MIB if is_kept else SMALLEST_MAPPING_BYTES)
        mallopt(_M_TRIM_THRESHOLD, 512 * MIB if is_kept else 128 * KIB)


@contextmanager
def heap_kept() -> Iterator[None]:
    """Keep the heap within, and no longer afterwards."""
    keep_heap()
    try:
        yield
    finally:
        keep_heap(is_kept=False)
        # While there is room in it, malloc maps nothing.
        release_free_memory()


def release_free_memory() -> None:
    """Give memory that is free inside this process back to the system, where the C library can.

    glibc keeps what was freed below its trim threshold; what a measurement leaves so would count against the next job.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def limit_data_segment(budget_bytes: int, rss_bytes: int, untouched_bytes: int = 0) -> int | None:
    """Bound the calling process's memory; returns the limit in bytes.

    Returns None where the kernel does not tell the size of a data segment (anything but Linux): there only the
    agent's watch over resident memory holds the budget. Arguments are those of :func:`data_segment_limit`.

    Raises:
        OutOfMemoryError: the budget is spent already.
    """
    if not _proc_is_mounted():
        return None
    data_bytes = _read_status(Path("/proc/self/status"))["VmData"]
    limit_bytes = data_segment_limit(budget_bytes, rss_bytes, data_bytes, untouched_bytes)
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard != resource.RLIM_INFINITY:
        limit_bytes = min(limit_bytes, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, hard))
    return limit_bytes


def limit_thread_stacks() -> None:
    """Lower the soft stack limit of this process and of the processes it starts from now on.

    glibc takes the size of thread stacks from it when a program starts, so a worker's own call would be too late.
    A limit that is lower already stays.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    if soft == resource.RLIM_INFINITY or soft > THREAD_STACK_BYTES:
        resource.setrlimit(resource.RLIMIT_STACK, (THREAD_STACK_BYTES, hard))


@cache
def _proc_is_mounted() -> bool:
    return Path("/proc/self/status").exists()


def _read_status(path: Path) -> dict[str, int]:
    """The lines of a /proc status file that are given in kB, in bytes."""
    sizes_bytes = {}
    for line in path.read_text(encoding="ascii", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if value.endswith(" kB"):
            sizes_bytes[name] = int(value.removesuffix(" kB")) * KIB
    return sizes_bytes


def _read_cpu_seconds(path: Path) -> float:
    # The second field is the program's name in brackets and may hold blanks and brackets itself.
    fields = path.read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    user_ticks, system_ticks = int(fields[11]), int(fields[12])
    return (user_ticks + system_ticks) / os.sysconf("SC_CLK_TCK")


def _read_usage_by_psutil(pid: int) -> ProcessUsage | None:
    # Imported here: an agent on Linux never needs it.
    import psutil

    try:
        process = psutil.Process(pid)
        with process.oneshot():
            rss_bytes = process.memory_info().rss
            times = process.cpu_times()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return None
    # Without /proc no peak is known; the agent keeps the largest value it saw.
    return ProcessUsage(rss_bytes=rss_bytes, peak_rss_bytes=rss_bytes, cpu_seconds=times.user + times.system)
