"""What an agent keeps on disk: its lock, its identity and its workers' logs.

Layout::

    agent.lock             held while the agent runs; its text is the agent's process id
    agent_id               made at the first start
    profiles.json          measured seconds, kept for later jobs
    logs/worker-<n>.log    stdout and stderr of the n-th worker process; .log.1 is what was rotated out
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import socket
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from plutino.errors import ConfigError
from plutino.sizes import KIB, MIB

MAX_LOG_BYTES = 4 * MIB
NUM_KEPT_LOGS = 16
LOG_TAIL_BYTES = 3 * KIB

_LOG_NAME = re.compile(r"worker-(\d+)\.log", re.ASCII)


def default_state_dir(name: str) -> Path:
    """State directory of the agent of this name for this user, by the XDG rules."""
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "plutino" / "nodes" / name


def host_id() -> str:
    """The same for all agents on one kernel, containers included, and different on every other machine."""
    # The boot id comes first: cloned disks share a machine id, and containers may have one of their own.
    for path in (Path("/proc/sys/kernel/random/boot_id"), Path("/etc/machine-id")):
        if path.is_file():
            source = path.read_text(encoding="ascii").strip()
            break
    else:
        source = f"{socket.gethostname()} {uuid.getnode()}"
    return hashlib.sha256(f"plutino host {source}".encode()).hexdigest()[:16]


class StateDir:
    """One agent's directory. Use everything but the constructor while holding :meth:`locked`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory; the kernel lets go of it however the process ends.

        Raises:
            ConfigError: another agent holds it, or it cannot be made.
        """
        lock_path = self.path / "agent.lock"
        try:
            (self.path / "logs").mkdir(parents=True, exist_ok=True)
            descriptor = os.open(lock_path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise ConfigError(
                f"state directory {self.path} cannot be used ({error}); choose another --state-dir"
            ) from error
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.read(descriptor, 32).decode(errors="replace") or "unknown"
                raise ConfigError(
                    f"another agent (process {holder}) runs with state directory {self.path}; "
                    "end it, or give this one another --name or --state-dir"
                ) from None
            os.ftruncate(descriptor, 0)
            os.write(descriptor, str(os.getpid()).encode())
            yield
        finally:
            os.close(descriptor)

    def agent_id(self) -> str:
        """The agent's identity, made once and kept over restarts."""
        path = self.path / "agent_id"
        if path.is_file() and (kept := path.read_text(encoding="ascii").strip()):
            return kept
        made = uuid.uuid4().hex
        part = path.with_suffix(".part")
        part.write_text(made, encoding="ascii")
        os.replace(part, path)
        return made

    def new_log(self, in_use: Collection[Path] = ()) -> Path:
        """Path of the next worker process's log; removes the oldest ones that are not in use."""
        numbered = sorted(
            (int(match[1]), path) for path in self._logs_dir.iterdir() if (match := _LOG_NAME.fullmatch(path.name))
        )
        for _, path in numbered[: max(0, len(numbered) - NUM_KEPT_LOGS + 1)]:
            if path not in in_use:
                path.unlink()
                rotated(path).unlink(missing_ok=True)
        return self._logs_dir / f"worker-{numbered[-1][0] + 1 if numbered else 1}.log"

    @property
    def _logs_dir(self) -> Path:
        return self.path / "logs"


def rotated(log_path: Path) -> Path:
    """Where the rotated part of a log lies."""
    return log_path.with_name(log_path.name + ".1")


def rotate_log(log_path: Path, max_bytes: int = MAX_LOG_BYTES) -> bool:
    """Move a log that has grown beyond the bound aside; returns whether it did.

    The process goes on writing to the same open file, in append mode, so the file is copied and emptied rather than
    renamed. Lines written between the two are lost.
    """
    if log_path.stat().st_size <= max_bytes:
        return False
    shutil.copyfile(log_path, rotated(log_path))
    os.truncate(log_path, 0)
    return True


def log_tail(log_path: Path, max_bytes: int = LOG_TAIL_BYTES) -> str:
    """The end of a log, for an error message."""
    with log_path.open("rb") as file:
        file.seek(max(0, log_path.stat().st_size - max_bytes))
        return file.read(max_bytes).decode(errors="replace").strip()
