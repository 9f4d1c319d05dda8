"""Parts of a long plan search as Ray tasks. Entry point: :class:`RayFan`.

Nothing ever waits for Ray: this process works through the parts from the last one on, Ray's workers from the first one
on, and what they have not finished by then is done here. So a search on a cold, busy or broken Ray is not slower than
one without Ray, and where a part runs has no influence on the plan.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

from coordinator.scheduling.problem import PlanningProblem
from partitioner.spread import PartResult, SearchPart, in_turn

logger = logging.getLogger(__name__)


def run_search_part(problem_json: str, part_json: str) -> str:
    """The task; strings, so that Ray pickles nothing of ours."""
    part = SearchPart.model_validate_json(part_json)
    return _problem(problem_json).run_part(part).model_dump_json()


@functools.lru_cache(maxsize=1)
def _problem(problem_json: str) -> PlanningProblem:
    """Kept between the parts that one worker gets."""
    return PlanningProblem.model_validate_json(problem_json)


class RayFan:
    """Implements :data:`partitioner.spread.Fan` for one problem; Ray must be connected in this process."""

    def __init__(self, problem: PlanningProblem) -> None:
        self._problem = problem
        self.tasks: dict[int, Any] = {}
        """Parts that Ray has, by their place."""

    def __call__(self, parts: Sequence[SearchPart], run: Callable[[SearchPart], PartResult]) -> list[PartResult]:
        """See :data:`partitioner.spread.Fan`."""
        self._hand_out(parts)
        if not self.tasks:
            return in_turn(parts, run)
        results: dict[int, PartResult] = {}
        for place in reversed(range(len(parts))):
            self._collect(results)
            if place not in results:
                self._take_back(place)
                results[place] = run(parts[place])
        logger.info("Ray did %d of %d parts of a search", len(results) - self._num_here, len(parts))
        return [results[place] for place in range(len(parts))]

    def _hand_out(self, parts: Sequence[SearchPart]) -> None:
        """All but the last to Ray, if it has a processor free."""
        import ray
        from ray.exceptions import RayError

        self.tasks, self._num_here = {}, 0
        try:
            free = ray.available_resources()  # type: ignore[no-untyped-call]
            if len(parts) < 2 or free.get("CPU", 0.0) < 1.0:
                return
            problem = ray.put(self._problem.model_dump_json())
            task = ray.remote(run_search_part).options(num_cpus=1, max_retries=0)
            for place, part in enumerate(parts[:-1]):
                self.tasks[place] = task.remote(problem, part.model_dump_json())
        except RayError as error:
            logger.warning("a search runs in this process alone: %s", error)

    def _collect(self, results: dict[int, PartResult]) -> None:
        """What Ray has finished. What failed there is left to be done here."""
        import ray
        from ray.exceptions import RayError

        if not self.tasks:
            return
        finished, _ = ray.wait(list(self.tasks.values()), num_returns=len(self.tasks), timeout=0)
        for place in [place for place, task in self.tasks.items() if task in finished]:
            try:
                results[place] = PartResult.model_validate_json(ray.get(self.tasks.pop(place)))
            except RayError as error:
                logger.warning("part %d of a search failed on Ray and is done here: %s", place, error)

    def _take_back(self, place: int) -> None:
        import ray

        self._num_here += 1
        if place in self.tasks:
            ray.cancel(self.tasks.pop(place))
