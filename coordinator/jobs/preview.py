"""The plan of a job that nobody has submitted: its data read and its devices measured, nothing stored or reserved."""

from __future__ import annotations

import asyncio

from coordinator.fleet.link_map import LinkMap
from coordinator.fleet.registry import FleetRegistry
from coordinator.jobs.job_ids import new_job_id
from coordinator.jobs.planning import make_problem
from coordinator.jobs.profiler import Profiler
from coordinator.jobs.runner_link import RunnerLink
from coordinator.scheduling.engine import Engine
from coordinator.scheduling.problem import PlanningProblem
from partitioner.plan import Plan
from plutino.errors import InfeasiblePlanError
from plutino.job.spec import JobSpec
from plutino.types import JobId


class Preview:
    """Plans jobs that are only asked about; the runner that reads such a job's data is found here by the job's id."""

    def __init__(self, *, fleet: FleetRegistry, engine: Engine, profiler: Profiler, link_map: LinkMap) -> None:
        self._fleet = fleet
        self._engine = engine
        self._profiler = profiler
        self._link_map = link_map
        self._links: dict[JobId, RunnerLink] = {}

    def runner_of(self, job_id: JobId) -> RunnerLink | None:
        """The runner of a job that is being planned."""
        return self._links.get(job_id)

    async def plan(self, spec: JobSpec, *, must_fit: bool = True) -> tuple[PlanningProblem, Plan | str]:
        """The plan that a job would get now if it were alone, and what it was made from; reserves nothing.

        Args:
            spec: the job, its model's revision pinned.
            must_fit: whether a job that does not fit is an error.

        Returns:
            The problem, and its plan, or where it need not fit and does not, the reason.

        Raises:
            InfeasiblePlanError: it does not fit.
        """
        job_id = JobId(new_job_id("plan"))
        link = RunnerLink(spec.model_dump_json(), lambda: self._engine.start_runner(job_id))
        self._links[job_id] = link
        try:
            prepared = await link.prepare()
            problem = await make_problem(
                job_id,
                spec,
                prepared,
                self._fleet,
                self._profiler,
                numerics=None,
                excluded={},
                is_started=False,
                links=self._link_map,
                must_fit=must_fit,
            )
            try:
                return problem, await asyncio.to_thread(problem.plan)
            except InfeasiblePlanError as error:
                if must_fit:
                    raise
                return problem, str(error)
        finally:
            link.finish()
            self._engine.stop_runner(job_id)
            del self._links[job_id]
