"""Where devices of one host meet to measure: each times its passes while all the others compute, as in a job.

Caches and memory bandwidth are the host's, so that a pass beside a busy neighbour takes up to half as long again as
alone. A measurement has windows (blocks, then the head), a window two milestones: ready to compute, and having had
enough. At either a worker tells, and goes on when the coordinator says so, which waits for all who were asked and not
for ever. Before a window everybody waits idle; towards its end everybody computes on.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol

PATIENCE_S = 180.0
"""A worker's, for the coordinator's word: longer than the coordinator's own for a device, so that it ends nothing but a
meeting of which nobody will say anything any more."""


class Meeting(Protocol):
    """Whom a measurement waits for."""

    def begin(self) -> None:
        """This device is ready; returns once all are."""

    def is_over(self) -> bool:
        """This device has had enough, from the first call on; whether all have."""


class Alone:
    """Nobody."""

    def begin(self) -> None:
        """At once."""

    def is_over(self) -> bool:
        """At once."""
        return True


ALONE = Alone()


class HostMeeting:
    """The devices of one host, whom the coordinator speaks for.

    Args:
        tell: takes each milestone once, counted from 0, when this device reaches it.
        patience_s: for the coordinator's word.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        tell: Callable[[int], None],
        *,
        patience_s: float = PATIENCE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tell = tell
        self._patience_s = patience_s
        self._clock = clock
        self._heard = threading.Condition()
        self._num_told = 0
        self._num_passed = 0
        self._told_s = 0.0
        self._is_in_window = False
        self.is_whole = True
        """All who were asked have been beside this device in every window."""

    def note(self, milestone: int, *, is_whole: bool) -> None:
        """The coordinator lets this device go on; from any thread."""
        with self._heard:
            self._num_passed = max(self._num_passed, milestone + 1)
            self.is_whole = self.is_whole and is_whole
            self._heard.notify_all()

    def begin(self) -> None:
        """See :class:`Meeting`."""
        self._reach()
        self._is_in_window = True
        with self._heard:
            if not self._heard.wait_for(self._may_go_on, self._patience_s):
                self._give_up()

    def is_over(self) -> bool:
        """See :class:`Meeting`."""
        if self._is_in_window:
            self._is_in_window = False
            self._reach()
        with self._heard:
            if not self._may_go_on() and self._clock() - self._told_s > self._patience_s:
                self._give_up()
            return self._may_go_on()

    def _reach(self) -> None:
        self._told_s = self._clock()
        self._num_told += 1
        self._tell(self._num_told - 1)

    def _may_go_on(self) -> bool:
        return self._num_passed >= self._num_told

    def _give_up(self) -> None:
        """Nobody says anything: nothing is waited for any more."""
        self.is_whole = False
        self._num_passed = 1 << 30
