"""A worker's imports, ten seconds of a processor, out of the way of whoever trains on the device meanwhile."""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

LOWEST_PRIORITY = 19


def import_behind_others() -> None:
    """Import what jobs and profiles need, with the processor's time that others leave.

    On one core a spare's imports halved the speed of the job beside it for 25 seconds. On Linux a priority is a
    thread's own, and only root may raise it again: so a thread of the lowest one imports and ends, and all that is
    started later has the process's priority. Elsewhere a process has one priority, and nothing is changed.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="imports", initializer=_yield_this_thread) as executor:
        executor.submit(_import).result()


def _yield_this_thread() -> None:
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)


def _import() -> None:
    import torch

    from edge_node import session  # noqa: F401 - what a job needs
    from edge_node.profile import warm_up

    # Much of a first warm-up is imports, too. With one thread it leaves no pool of threads of this priority behind.
    torch.set_num_threads(1)
    warm_up()
