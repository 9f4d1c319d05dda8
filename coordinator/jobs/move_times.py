"""Where the seconds of a move go, from the decision behind a commit until the job runs again."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection

from plutino.events import Moved
from protos import workers_pb2 as pb

STORE, STOP, PLAN, LOAD, LINK = "store", "stop", "plan", "load", "link"
_LOADING_PARTS = ("weights", "adapter", "cache", "state")


class MoveTimes:
    """The clock of one move. It lives in this process alone: after a restart a move goes on untimed.

    Args:
        step: steps done.
        clock: seconds that never go back.
    """

    def __init__(self, step: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._step = step
        self._clock = clock
        self._started_s = self._last_s = clock()
        self._parts: dict[str, float] = {}

    def end(self, part: str) -> None:
        """A part is over, and the next one begins; parts that come again are added up."""
        now_s = self._clock()
        self._parts[part] = self._parts.get(part, 0.0) + now_s - self._last_s
        self._last_s = now_s

    def told(self, plan_epoch: int, loaded: Collection[pb.StageLoaded]) -> Moved:
        """What people are told.

        Args:
            plan_epoch: of the new plan.
            loaded: what its workers said; the slowest one stands for all.
        """
        state_by_place: Counter[str] = Counter()
        for one in loaded:
            state_by_place.update(one.state_by_place)
        slowest = max(loaded, key=lambda one: one.seconds, default=pb.StageLoaded())
        return Moved(
            step=self._step,
            plan_epoch=plan_epoch,
            seconds=self._last_s - self._started_s,
            seconds_by_part=dict(self._parts),
            loading_by_part={
                part: slowest.seconds_by_part[part] for part in _LOADING_PARTS if part in slowest.seconds_by_part
            },
            state_by_place=state_by_place,
            num_went_on=sum(one.went_on for one in loaded),
            num_workers=len(loaded),
        )
