"""Many jobs that want memory at once, over a real store; every decision is checked when it is written."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

from coordinator.fleet.membership import Change as FleetChange
from coordinator.fleet.membership import Device
from coordinator.fleet.registry import FleetRegistry, WorkerExit
from coordinator.jobs.record import JobRecord, JobState
from coordinator.scheduling.engine import Engine
from coordinator.scheduling.problem import PlanningProblem
from coordinator.scheduling.queue import PlanningQueue
from coordinator.scheduling.round import Verdict
from coordinator.scheduling.scheduler import Reservation
from coordinator.storage.base import Change
from coordinator.storage.sqlite import SqliteStore
from partitioner.device import DeviceProfile
from plutino.types import AgentId, JobId


class ReservationLoad:
    """Jobs that hold their memory until no other fits any more, all with one problem.

    Args:
        engine: decides the rounds.
        folder: for the store.
        problem: of every job.
        num_jobs: all of them wait from the beginning.
        on_reserved: called after each reservation with their number; may kill things.
    """

    def __init__(
        self,
        engine: Engine,
        folder: Path,
        problem: PlanningProblem,
        num_jobs: int,
        on_reserved: Callable[[int], Awaitable[None]],
    ) -> None:
        self.store = SqliteStore(folder / "load.sqlite")
        self.most_running = 0
        self._num_carried_out = 0
        self._engine = engine
        self._problem = problem
        self._on_reserved = on_reserved
        self._waiting = [JobId(f"job-{number:03}") for number in range(num_jobs)]
        self._running: set[JobId] = set()
        self._fleet = FleetRegistry(incarnation=1, on_change=_ignore, on_worker_exit=_ignore)
        for stream, profile in enumerate(problem.devices, start=1):
            self._fleet.fleet, _ = self._fleet.fleet.hello(_device(profile), stream, 0.0)
        self._budgets = {profile.agent_id: profile.available_bytes for profile in problem.devices}

    @property
    def num_reserved(self) -> int:
        """Jobs that have got their memory so far."""
        return sum(record.state is JobState.LOADING for record in self.store.jobs())

    async def run(self) -> None:
        """Until every job had its memory; halfway the coordinator's own part is forgotten and built from the rows."""
        for position, job_id in enumerate(self._waiting):
            record = JobRecord(
                job_id=job_id, name=job_id, spec_json="{}", submitted_at_s=position, state=JobState.PLANNING
            )
            await asyncio.wrap_future(self.store.submit(record))
        half = len(self._waiting) // 2
        await self._drive(until_left=half)
        await self._drive(until_left=0)
        await self._end_running()

    async def _drive(self, until_left: int) -> None:
        self._running = {row.job_id for row in self.store.reservations()}
        self._queue = PlanningQueue(store=self.store, fleet=self._fleet, engine=self._engine)
        rounds = asyncio.create_task(self._queue.run())
        jobs = {job_id: asyncio.create_task(self._place(job_id)) for job_id in self._waiting}
        while len(self._waiting) > until_left:
            done, _ = await asyncio.wait({rounds, *jobs.values()}, return_when=asyncio.FIRST_COMPLETED)
            assert rounds not in done, rounds.exception()
            for job_id in [job_id for job_id, task in jobs.items() if task in done]:
                jobs.pop(job_id).result()
                self._waiting.remove(job_id)
        for task in (rounds, *jobs.values()):
            task.cancel()
        await asyncio.wait({rounds, *jobs.values()})
        # Writes that were handed in before the end are done; the next part starts from them.
        await asyncio.wrap_future(self.store.put_value("drained", "yes"))
        self._waiting = [job_id for job_id in self._waiting if self.store.job(job_id).state is JobState.PLANNING]

    async def _place(self, job_id: JobId) -> None:
        problem = self._problem.model_copy(update={"job_id": job_id})
        await self._queue.place(job_id, problem, lambda verdict: self._carry_out(job_id, verdict))

    async def _carry_out(self, job_id: JobId, verdict: Verdict) -> bool:
        if verdict.kind == "wait":
            await self._end_running()
            return False
        assert verdict.kind == "reserve" and verdict.plan is not None, verdict
        before = self.store.job(job_id)
        rows = tuple(Reservation(job_id=job_id, agent_id=AgentId(h.agent_id), bytes=h.bytes) for h in verdict.held)
        after = replace(before, state=JobState.LOADING, plan_json=verdict.plan.model_dump_json())
        change = Change(before=before, after=after, event="Planned", at_s=time.time(), reservations=rows)
        await asyncio.wrap_future(self.store.save(change))
        self._running.add(job_id)
        self._check(job_id, verdict)
        self._num_carried_out += 1
        await self._on_reserved(self._num_carried_out)
        return True

    def _check(self, job_id: JobId, verdict: Verdict) -> None:
        """No device gives more than it has, and a job has all of its plan's memory or none."""
        held: Counter[str] = Counter()
        of_job: dict[str, int] = {}
        for row in self.store.reservations():
            held[row.agent_id] += row.bytes
            if row.job_id == job_id:
                of_job[row.agent_id] = row.bytes
        assert verdict.plan is not None
        assert set(of_job) == set(verdict.plan.agent_ids)
        assert all(held[agent_id] <= self._budgets[agent_id] for agent_id in held), (held, self._budgets)
        self.most_running = max(self.most_running, len(self._running))

    async def _end_running(self) -> None:
        for job_id in self._running:
            await asyncio.wrap_future(self.store.release(job_id))
        self._running.clear()
        self._queue.kick()


def _device(profile: DeviceProfile) -> Device:
    return Device(
        agent_id=AgentId(profile.agent_id),
        name=profile.name,
        host_id=profile.host_id,
        memory_budget_bytes=profile.available_bytes,
        baseline_bytes=profile.baseline_bytes,
        threads=profile.threads,
    )


def _ignore(event: FleetChange | WorkerExit) -> None:
    """Nobody else listens."""
