"""The plan of a job that nobody has submitted: its data read and its devices measured, nothing stored or reserved."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from coordinator.fleet.link_map import LinkMap
from coordinator.fleet.registry import FleetRegistry
from coordinator.jobs.job_ids import new_job_id
from coordinator.jobs.method_choice import (
    PlannedOption,
    candidates,
    choose,
    has_later_epochs,
    is_open,
    priced,
    refused,
    settled,
)
from coordinator.jobs.planning import make_problem
from coordinator.jobs.prepared import PreparedData
from coordinator.jobs.profiler import Profiler
from coordinator.jobs.runner_link import RunnerLink
from coordinator.scheduling.engine import Engine
from coordinator.scheduling.problem import PlanningProblem
from partitioner.plan import Plan
from plutino.errors import ConfigError, InfeasiblePlanError, ModelError, PlanError
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
            InfeasiblePlanError: it does not fit, or leaves its method open and no method does.
        """
        if is_open(spec):
            _, problem, plan = await self.choose(spec)
            return problem, plan
        async with self._prepared(spec) as (job_id, prepared):
            problem = await self._problem(job_id, spec, prepared, must_fit=must_fit)
            try:
                return problem, await asyncio.to_thread(problem.plan)
            except InfeasiblePlanError as error:
                if must_fit:
                    raise
                return problem, str(error)

    async def choose(self, spec: JobSpec) -> tuple[JobSpec, PlanningProblem, Plan]:
        """A job that leaves its method open with the one that the devices train it with in the shortest time.

        Raises:
            InfeasiblePlanError: no method fits.
            DataError, ModelError: the rows or the base model cannot be used.
        """
        async with self._prepared(spec) as (job_id, prepared):
            steps = prepared.total_steps
            planned: list[PlannedOption] = []
            for option in candidates(spec, has_later_epochs=has_later_epochs(spec, prepared.num_train, steps)):
                if option.spec is None:
                    planned.append(refused(option, option.why_not))
                    continue
                try:
                    problem = await self._problem(job_id, option.spec, prepared, must_fit=True)
                    plan = await asyncio.to_thread(problem.plan)
                except (ConfigError, ModelError, PlanError) as error:
                    planned.append(refused(option, error))
                else:
                    planned.append(await asyncio.to_thread(priced, option, problem, plan, steps))
            return settled(*choose(planned, steps))

    @asynccontextmanager
    async def _prepared(self, spec: JobSpec) -> AsyncIterator[tuple[JobId, PreparedData]]:
        """A runner that has read the job's rows, under an id of its own."""
        job_id = JobId(new_job_id("plan"))
        link = RunnerLink(spec.model_dump_json(), lambda: self._engine.start_runner(job_id))
        self._links[job_id] = link
        try:
            yield job_id, await link.prepare()
        finally:
            link.finish()
            self._engine.stop_runner(job_id)
            del self._links[job_id]

    async def _problem(
        self, job_id: JobId, spec: JobSpec, prepared: PreparedData, *, must_fit: bool
    ) -> PlanningProblem:
        return await make_problem(
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
