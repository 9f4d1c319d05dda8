"""The processes that an incarnation of the coordinator started for Ray, and their end if it died without ending them.

A record on disk names every process by its pid and its start time, so that a pid that has been given to somebody else
since is never signalled. Entry points: :func:`process_tree`, :func:`write_record`, :func:`read_record`, :func:`reap`.
Nothing here knows Ray.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable
from pathlib import Path

import psutil
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from coordinator.artifacts.durable import sync_dir, write_durable
from plutino.errors import StoreError

logger = logging.getLogger(__name__)

SESSION_PREFIX = "plutino-ray-"
"""Names of the folders that :func:`remove_session` is willing to remove."""

_KILL_WITHIN_S = 5.0
_SAME_START_S = 0.01
"""The kernel counts a process's start in ticks of 10 ms. A clock that was set since moves start times by as much as it
was moved; such orphans are left alone, which is the safe side."""


class RecordedProcess(BaseModel):
    """One process, for as long as the machine is up."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    pid: int = Field(gt=1)
    start_time_s: float
    """Since the epoch, as psutil counts it."""
    name: str
    """For the log."""


class ProcessRecord(BaseModel):
    """What must be gone before the next incarnation starts its own."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    session_dir: Path
    """Sockets and logs of these processes."""
    processes: tuple[RecordedProcess, ...] = ()


def process_tree(parent_pid: int, mark: str) -> tuple[RecordedProcess, ...]:
    """The children of a process whose command line mentions ``mark``, and everything below them.

    The mark keeps out children that the parent started for other purposes.
    """
    found: list[RecordedProcess] = []
    for child in _children(parent_pid):
        try:
            is_ours = any(mark in argument for argument in child.cmdline())
        except psutil.NoSuchProcess:
            continue
        tree = [child, *_children(child.pid, recursive=True)] if is_ours else []
        found.extend(filter(None, map(_recorded, tree)))
    return tuple(found)


def is_running(process: RecordedProcess) -> bool:
    """Whether it lives; a zombie does not."""
    return _find(process) is not None


def write_record(path: Path, record: ProcessRecord) -> None:
    """Replace the record; it is on the disk when this returns."""
    draft = path.with_suffix(".draft")
    write_durable(draft, record.model_dump_json(indent=1).encode())
    draft.rename(path)
    sync_dir(path.parent)


def read_record(path: Path) -> ProcessRecord | None:
    """The record that an earlier incarnation left; None if it ended well.

    Raises:
        StoreError: the file is not a record.
    """
    try:
        return ProcessRecord.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        # It is replaced by rename, so it is never half written: somebody has edited it, or it is not ours.
        raise StoreError(
            f"{path} does not list the processes that an earlier coordinator started for Ray: {error}; see that none "
            "of them is left (names begin with ray, raylet or gcs_server), then remove the file"
        ) from error


def reap(processes: Iterable[RecordedProcess]) -> tuple[RecordedProcess, ...]:
    """Kill what still runs of these processes, with everything below it, and wait for their end.

    Returns the recorded ones that were found alive. They get no chance to end by themselves: their owner is gone, and
    nothing that they hold is true.
    """
    alive: list[RecordedProcess] = []
    doomed: dict[int, psutil.Process] = {}
    for recorded in processes:
        process = _find(recorded)
        if process is None:
            continue
        alive.append(recorded)
        doomed[process.pid] = process
        doomed.update((child.pid, child) for child in _children(process.pid, recursive=True))
    for process in doomed.values():
        try:
            process.kill()  # psutil compares the start time once more
        except psutil.NoSuchProcess:
            continue
        except psutil.AccessDenied:
            logger.warning("may not kill %s, which an earlier coordinator started for Ray", process)
    _, survivors = psutil.wait_procs(list(doomed.values()), timeout=_KILL_WITHIN_S)
    for process in survivors:
        logger.warning("%s was killed but has not gone within %.0f s", process, _KILL_WITHIN_S)
    return tuple(alive)


def remove_session(session_dir: Path) -> None:
    """Remove a session's folder.

    Raises:
        StoreError: the folder does not look like one of ours.
    """
    if not session_dir.name.startswith(SESSION_PREFIX) or session_dir.is_symlink():
        raise StoreError(f"will not remove {session_dir}, its name does not begin with {SESSION_PREFIX}")
    if session_dir.exists():
        shutil.rmtree(session_dir)


def forget(path: Path, record: ProcessRecord) -> tuple[RecordedProcess, ...]:
    """End what a record names, remove its folder, and then the record; returns what was still alive."""
    alive = reap(record.processes)
    remove_session(record.session_dir)
    path.unlink(missing_ok=True)
    sync_dir(path.parent)
    return alive


def _children(pid: int, *, recursive: bool = False) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=recursive)
    except psutil.NoSuchProcess:
        return []


def _recorded(process: psutil.Process) -> RecordedProcess | None:
    try:
        recorded = RecordedProcess(pid=process.pid, start_time_s=process.create_time(), name=process.name())
        return None if process.status() == psutil.STATUS_ZOMBIE else recorded
    except psutil.NoSuchProcess:
        return None


def _find(recorded: RecordedProcess) -> psutil.Process | None:
    """The recorded process itself; None if it is gone, or if its pid belongs to another one now."""
    try:
        process = psutil.Process(recorded.pid)
        if abs(process.create_time() - recorded.start_time_s) > _SAME_START_S:
            return None
        return None if process.status() == psutil.STATUS_ZOMBIE else process
    except psutil.NoSuchProcess:
        return None
