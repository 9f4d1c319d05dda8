"""When a job's last step is near: pure but for the clock."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

AHEAD_S = 20.0
"""What the end needs takes 4 s to import on a quiet core and three times that on a slow one, or beside a worker."""
_NUM_LOOKED_AT = 6
"""Questions whose pace counts: an epoch from the cache is quicker than the one before."""


class NearEnd:
    """Watches the questions for steps' rows, which come a step or two before the step.

    Args:
        last_step: of the job.
        clock: seconds, monotonic.
    """

    def __init__(self, last_step: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._last_step = last_step
        self._clock = clock
        self._asked: deque[tuple[int, float]] = deque(maxlen=_NUM_LOOKED_AT)

    def is_reached(self, step: int) -> bool:
        """Whether the last step's rows are those that are asked for now, or will be within :data:`AHEAD_S`."""
        now_s = self._clock()
        first_step, first_s = self._asked[0] if self._asked else (step, now_s)
        self._asked.append((step, now_s))
        if step <= first_step:
            # Nothing is known of the pace, or the job went back to an earlier step.
            return step >= self._last_step
        pace_s = (now_s - first_s) / (step - first_step)
        return (self._last_step - step) * pace_s <= AHEAD_S
