"""Runs a Python program that ends when its starter does: ``python -m coordinator.leash -m MODULE ARGUMENT...``.

The starter holds the other end of this process's standard input. However the starter ends, SIGKILL included, the input
ends with it; the program then gets SIGTERM, which the coordinator and the agents take as the wish to end in good order,
and after a while SIGKILL. ``-c CODE`` works as ``-m MODULE`` does.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
import time

_GRACE_S = 20.0
"""Longer than a coordinator or an agent takes to end its own children."""


def main() -> None:
    """Watch standard input, and run the program of the command line in this process."""
    kind, program, *arguments = sys.argv[1:]
    # A descriptor of its own: the program may do with its standard input what it likes.
    leash = os.dup(sys.stdin.fileno())
    os.set_inheritable(leash, False)
    threading.Thread(target=_end_with_starter, args=(leash,), name="leash", daemon=True).start()
    if kind == "-m":
        sys.argv = [program, *arguments]
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        sys.argv = [kind, *arguments]
        exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})


def _end_with_starter(leash: int) -> None:
    while os.read(leash, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE_S)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
