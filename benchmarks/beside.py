"""Processes of one benchmark beside each other, each on its own processors, with a bound on the wait for them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

_PATIENCE_S = 60.0
"""Beyond the minutes that a process gives itself, until it is ended from outside; and from that to the kill."""


def run_beside(commands: Mapping[str, Sequence[str]], cores: Mapping[str, Sequence[int]], *, minutes: float) -> int:
    """Run ``python -m`` commands at once and wait for all of them; none is left when this returns.

    Args:
        commands: arguments after ``-m``, by name.
        cores: the processors of each.
        minutes: how long they take at the most by their own account.

    Returns:
        The largest exit status; of one that was ended from outside, the signal's number.
    """
    before = os.sched_getaffinity(0)
    children: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, arguments in commands.items():
            # A child begins with the processors of the thread that forks it.
            os.sched_setaffinity(0, cores[name])
            children[name] = subprocess.Popen([sys.executable, "-m", *arguments])
        for child in children.values():
            child.wait(60 * minutes + _PATIENCE_S)
    except subprocess.TimeoutExpired as error:
        print(f"not through in time: {error}", file=sys.stderr)
    finally:
        os.sched_setaffinity(0, before)
        for child in children.values():
            if child.poll() is None:
                child.terminate()
        for child in children.values():
            _reap(child)
    return int(max(abs(child.returncode) for child in children.values()))


def _reap(child: subprocess.Popen[bytes]) -> None:
    try:
        child.wait(_PATIENCE_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
