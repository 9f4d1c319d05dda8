"""Processes that the demo starts and, on every path, ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from plutino.errors import PlutinoError

_POLL_S = 0.1
_END_S = 10.0
"""From the polite request to the kill."""
_SHOWN_LOG_BYTES = 2000

Found = TypeVar("Found")


@dataclass(frozen=True, slots=True, eq=False)
class Child:
    """One process with its log."""

    name: str
    process: subprocess.Popen[bytes]
    log_path: Path

    def last_words(self) -> str:
        """The end of its log."""
        tail = self.log_path.read_bytes()[-_SHOWN_LOG_BYTES:].decode(errors="replace").strip()
        return f"{tail}\n(whole log: {self.log_path})"


class Children:
    """Python processes of this installation; leaving the ``with`` block ends and reaps them all, the last one first.

    Where there is nobody left to leave the block, after SIGKILL, they end by themselves: see
    :mod:`coordinator.leash`.
    """

    def __init__(self, log_dir: Path) -> None:
        self._log_dir = log_dir
        self._children: list[Child] = []

    def __enter__(self) -> Children:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with _no_interrupts():
            self.stop(*reversed(self._children))

    def start(self, name: str, *arguments: str, environment: Mapping[str, str] | None = None) -> Child:
        """Start ``python`` with these arguments; its output goes to a log named after it.

        Args:
            name: of the child and of its log.
            arguments: what follows ``python``: ``-m MODULE`` or ``-c CODE``, and the program's own.
            environment: variables beside this process's own.
        """
        log_path = self._log_dir / f"{name}.log"
        with log_path.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "coordinator.leash", *arguments],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **(environment or {})},
                # Ctrl-C is for us alone: the children are ended in order.
                start_new_session=True,
            )
        child = Child(name, process, log_path)
        self._children.append(child)
        return child

    def stop(self, *children: Child) -> None:
        """End processes, by force if they take too long, and reap them."""
        for child in children:
            if child.process.poll() is None:
                child.process.terminate()
        deadline_s = time.monotonic() + _END_S
        for child in children:
            try:
                child.process.wait(max(0.0, deadline_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                # Not reaped yet, so its process group still has its number.
                os.killpg(child.process.pid, signal.SIGKILL)
                child.process.wait()
            assert child.process.stdin is not None
            child.process.stdin.close()
        self._children = [child for child in self._children if child not in children]

    def wait_for(self, what: str, look: Callable[[], Found | None], timeout_s: float) -> Found:
        """What ``look`` finds, asked again and again.

        Raises:
            PlutinoError: a process ended meanwhile, or nothing was found in time.
        """
        deadline_s = time.monotonic() + timeout_s
        while (found := look()) is None:
            for child in self._children:
                if (code := child.process.poll()) is not None:
                    raise PlutinoError(f"{child.name} ended with exit code {code}: {child.last_words()}")
            if time.monotonic() > deadline_s:
                logs = ", ".join(str(child.log_path) for child in self._children)
                raise PlutinoError(f"{what} did not happen within {timeout_s:.0f} s; see the logs: {logs}")
            time.sleep(_POLL_S)
        return found

    def wait_for_end(self, child: Child, timeout_s: float) -> None:
        """Wait until a process has ended well.

        Raises:
            PlutinoError: it failed, or took too long.
        """
        try:
            code = child.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise PlutinoError(f"{child.name} did not end within {timeout_s:.0f} s: {child.last_words()}") from None
        if code != 0:
            raise PlutinoError(f"{child.name} ended with exit code {code}: {child.last_words()}")
        assert child.process.stdin is not None
        child.process.stdin.close()
        self._children.remove(child)


@contextlib.contextmanager
def interrupted_by_termination() -> Iterator[None]:
    """Within it, SIGTERM and SIGHUP are a KeyboardInterrupt, so that cleaning up happens for them too."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    earlier = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _no_interrupts() -> Iterator[None]:
    """A second Ctrl-C must not leave processes behind."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    earlier = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
