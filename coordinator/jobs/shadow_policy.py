"""How often a job's state is copied to the coordinator: pure."""

from __future__ import annotations

import math
from typing import Literal

SHARE_OF_TIME = 0.02
"""A shadow's upload may take this share of the time between shadows."""
FIRST_EVERY_STEPS = 10
"""Before anything is measured."""
MOST_STEPS = 1000


def shadow_due(steps_done: int, total_steps: int, every: int) -> bool:
    """Whether the state after so many steps is stored; the last step's always is."""
    return steps_done == total_steps or steps_done % every == 0


def shadow_every(setting: int | Literal["auto"], *, step_s: float | None, upload_s: float | None) -> int:
    """Steps between shadows.

    Args:
        setting: what the job says.
        step_s: measured seconds of a step; None before the first.
        upload_s: seconds of the slowest stage's last upload; None before the first.
    """
    if setting != "auto":
        return setting
    if step_s is None or upload_s is None or step_s <= 0:
        return FIRST_EVERY_STEPS
    return min(MOST_STEPS, max(FIRST_EVERY_STEPS, math.ceil(upload_s / (SHARE_OF_TIME * step_s))))
