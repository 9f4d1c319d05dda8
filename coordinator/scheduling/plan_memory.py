"""Plans by what they were asked for: a queue asks the same of its waiting jobs round after round.

A search is a pure function, so nothing here has to be true: a process that forgets it only computes longer.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable

from coordinator.scheduling.problem import PlanningProblem
from partitioner.device import DeviceProfile
from partitioner.plan import Plan
from plutino.errors import InfeasiblePlanError

MAX_PLANS = 1_000
"""Of some tens of kilobytes each."""

Search = Callable[[PlanningProblem], Plan]


class PlanMemory:
    """The last plans and refusals of a process; from any thread."""

    def __init__(self, max_plans: int = MAX_PLANS) -> None:
        self._max_plans = max_plans
        self._lock = threading.Lock()
        self._found: OrderedDict[tuple[bytes, tuple[tuple[str, int], ...]], Plan | str] = OrderedDict()

    def remembering(self, problem: PlanningProblem, search: Search) -> Callable[[tuple[DeviceProfile, ...]], Plan]:
        """The problem's search over some of its devices with other memory free, asked once for equal questions."""
        bare = problem.model_copy(update={"job_id": ""})
        asked = hashlib.sha256(bare.model_dump_json().encode()).digest()

        def plan(profiles: tuple[DeviceProfile, ...]) -> Plan:
            key = (asked, tuple((profile.agent_id, profile.available_bytes) for profile in profiles))
            with self._lock:
                found = self._found.get(key)
                if found is not None:
                    self._found.move_to_end(key)
            if found is None:
                try:
                    found = search(problem.model_copy(update={"devices": profiles}))
                except InfeasiblePlanError as error:
                    found = str(error)
                self._keep(key, found)
            if isinstance(found, str):
                raise InfeasiblePlanError(found)
            return found

        return plan

    def _keep(self, key: tuple[bytes, tuple[tuple[str, int], ...]], found: Plan | str) -> None:
        with self._lock:
            self._found[key] = found
            while len(self._found) > self._max_plans:
                self._found.popitem(last=False)
