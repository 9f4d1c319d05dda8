"""Named places where a test kills the coordinator.

``PLUTINO_CRASH_AT=name`` ends the process at the first pass of that place by SIGKILL, as a power cut would; with
``name:N``, at the N-th pass. Without the variable a crash point does nothing.
"""

from __future__ import annotations

import os
import signal

CRASH_POINTS = (
    "job_stored",
    "plan_reserved",
    "workers_started",
    "workers_linked",
    "step_fed",
    "votes_complete",
    "step_row_stored",
    "commit_half_sent",
    "commit_sent",
    "shadow_recorded",
    "evaluation_stored",
    "recovery_stored",
    "training_done_stored",
    "adapter_assembled",
    "adapter_published",
)
"""In the order in which a job meets them."""

_passes: dict[str, int] = {}


def crash_point(name: str) -> None:
    """Mark a place; dies here if the environment says so."""
    assert name in CRASH_POINTS, name
    wanted = os.environ.get("PLUTINO_CRASH_AT", "")
    if not wanted.startswith(name):
        return
    wanted_name, _, count = wanted.partition(":")
    if wanted_name != name:
        return
    _passes[name] = _passes.get(name, 0) + 1
    if _passes[name] == int(count or 1):
        os.kill(os.getpid(), signal.SIGKILL)
