"""Processes that tests start end when pytest does, SIGKILL included.

A :class:`Leash` starts a small watcher, this file run as a program, and holds the other end of its standard input.
However this process ends, that input ends with it; the watcher then ends what it was told to hold.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

GRACE_S = 20.0
"""From SIGTERM to SIGKILL: longer than a coordinator or an agent takes to end its own children."""
POLL_S = 0.05


class Leash:
    """Holds processes that were started with ``start_new_session``, each with its whole process group."""

    def __init__(self) -> None:
        self._watcher = subprocess.Popen(
            # Nothing of site-packages, so that it costs 20 ms; a session of its own, so that no signal to ours hits it.
            [sys.executable, "-S", "-E", __file__],
            stdin=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def hold(self, pid: int) -> None:
        """From now on this process ends with ours."""
        self._tell(pid)

    def let_go(self, pid: int) -> None:
        """It was reaped: its number may soon be somebody else's."""
        self._tell(-pid)

    def close(self) -> None:
        """End the watcher, and what is still held."""
        self._watcher.communicate(timeout=GRACE_S + 10)

    def _tell(self, number: int) -> None:
        assert self._watcher.stdin is not None
        self._watcher.stdin.write(f"{number}\n")
        self._watcher.stdin.flush()


def watch() -> None:
    """Read what to hold until the input ends, then end all of it."""
    held: set[int] = set()
    for line in sys.stdin:
        number = int(line)
        if number > 0:
            held.add(number)
        else:
            held.discard(-number)
    signal_all(held, signal.SIGTERM)
    deadline_s = time.monotonic() + GRACE_S
    # Signal 0 only asks whether somebody is there.
    while signal_all(held, 0) and time.monotonic() < deadline_s:
        time.sleep(POLL_S)
    signal_all(held, signal.SIGKILL)


def signal_all(groups: set[int], number: int) -> int:
    """Send a signal to process groups; how many of them are there."""
    num_there = 0
    for group in groups:
        try:
            os.killpg(group, number)
        except ProcessLookupError:
            continue
        num_there += 1
    return num_there


if __name__ == "__main__":
    watch()
