"""A worker's imports, ten seconds of a processor, out of the way of whoever trains on the device meanwhile."""

from __future__ import annotations

import errno
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)

LOW_PRIORITY = 10
"""By the kernel's weights a tenth of a processor beside whoever computes without a pause. The lowest, 19, gives 1.5 %,
with which a second job would wait ten minutes for the spare that measures for it, and so would whoever follows a lost
worker."""
OWN_AUTOGROUP = Path("/proc/self/autogroup")
_TRIES = 100
_BETWEEN_TRIES_S = 0.1
"""The kernel lets all processes together change one autogroup in a tenth of a second."""


def import_behind_others() -> None:
    """Import what jobs and profiles need, with the processor's time that others leave.

    On one core a spare's imports halved the speed of the job beside it for 25 seconds. On Linux a priority is a
    thread's own, and only root may raise it again: so a thread of a low one imports and ends, and all that is
    started later has the process's priority. Where the kernel shares its time among sessions first (sched(7),
    autogroups), a thread's priority counts within its session alone, which is this process; then the session has a
    low one meanwhile. Elsewhere a process has one priority, and nothing is changed.
    """
    with (
        _session_yields(OWN_AUTOGROUP),
        ThreadPoolExecutor(1, thread_name_prefix="imports", initializer=_yield_this_thread) as executor,
    ):
        executor.submit(_import).result()


def _yield_this_thread() -> None:
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOW_PRIORITY)


@contextmanager
def _session_yields(autogroup: Path) -> Iterator[None]:
    """Give the session that this process leads a low priority, where sessions have one."""
    if os.getsid(0) != os.getpid() or not autogroup.exists() or not _set(autogroup, LOW_PRIORITY):
        yield
        return
    try:
        yield
    finally:
        if not _set(autogroup, 0):
            logger.warning("%s cannot be set back: this worker computes at a low priority", autogroup)


def _set(autogroup: Path, priority: int) -> bool:
    """Whether a session's priority could be set."""
    for _ in range(_TRIES):
        try:
            autogroup.write_text(str(priority), encoding="ascii")
        except OSError as error:
            if error.errno != errno.EAGAIN:
                return False
            time.sleep(_BETWEEN_TRIES_S)
        else:
            return True
    return False


def _import() -> None:
    import torch

    from edge_node import session  # noqa: F401 - what a job needs
    from edge_node.profile import warm_up

    # Much of a first warm-up is imports, too. With one thread it leaves no pool of threads of this priority behind.
    torch.set_num_threads(1)
    warm_up()
