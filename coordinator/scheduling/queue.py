"""The queue of jobs that wait for a plan and its memory, in the coordinator's process.

Asks the engine for a round of decisions whenever something changed, and carries the decisions out one after the other,
so that memory promised to one job is never promised to a second.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from coordinator.fleet.registry import FleetRegistry
from coordinator.scheduling.engine import Engine
from coordinator.scheduling.problem import PlanningProblem
from coordinator.scheduling.round import HeldMemory, SchedulingAnswer, SchedulingRound, Verdict
from coordinator.storage.base import Store
from plutino.errors import JobError, PlutinoError
from plutino.types import JobId

logger = logging.getLogger(__name__)

_MOST_FAILURES = 20
"""A fresh Ray may take half a minute to come; after some minutes it will not."""
_LOOK_AGAIN_S = 5.0
"""A lost wake-up must not strand a job."""


@dataclass(slots=True)
class _Entry:
    problem: PlanningProblem
    carry_out: Callable[[Verdict], Awaitable[bool]]
    done: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class PlanningQueue:
    """Jobs in the order of their submission."""

    def __init__(self, *, store: Store, fleet: FleetRegistry, engine: Engine) -> None:
        self._store = store
        self._fleet = fleet
        self._engine = engine
        self._entries: dict[JobId, _Entry] = {}
        self._kicked = asyncio.Event()
        self._num_failures = 0

    def kick(self) -> None:
        """Something changed that may let a job start."""
        self._kicked.set()

    async def place(
        self, job_id: JobId, problem: PlanningProblem, carry_out: Callable[[Verdict], Awaitable[bool]]
    ) -> None:
        """Stand in the queue until ``carry_out`` says that a verdict has settled the matter.

        Raises:
            PlutinoError: what carrying out met.
        """
        entry = _Entry(problem, carry_out)
        self._entries[job_id] = entry
        self.kick()
        try:
            await entry.done
        finally:
            self._entries.pop(job_id, None)
            self.kick()

    async def run(self) -> None:
        """Run forever."""
        while True:
            kicked = asyncio.create_task(self._kicked.wait())
            try:
                # Not wait_for: before Python 3.12 that loses a cancellation which comes together with the kick.
                await asyncio.wait({kicked}, timeout=_LOOK_AGAIN_S)
            finally:
                kicked.cancel()
            self._kicked.clear()
            if self._entries:
                await self._round()

    async def _round(self) -> None:
        submitted = {record.job_id: position for position, record in enumerate(self._store.jobs())}
        waiting = sorted(self._entries, key=lambda job_id: submitted[job_id])
        try:
            answer = SchedulingAnswer.model_validate_json(
                await self._engine.solve(self._question(waiting).model_dump_json())
            )
        except Exception as error:
            # The scheduler may be on its way back; nothing was decided, and the next look asks again.
            logger.exception("a round of scheduling failed")
            self._num_failures += 1
            if self._num_failures >= _MOST_FAILURES:
                self._give_up(f"{type(error).__name__}: {error}")
            return
        self._num_failures = 0
        for verdict in answer.verdicts:
            entry = self._entries.get(JobId(verdict.job_id))
            if entry is None or entry.done.done():
                continue
            try:
                if await entry.carry_out(verdict) and not entry.done.done():
                    entry.done.set_result(None)
            except PlutinoError as error:
                if not entry.done.done():
                    entry.done.set_exception(error)

    def _give_up(self, why: str) -> None:
        for entry in self._entries.values():
            if not entry.done.done():
                entry.done.set_exception(
                    JobError(f"the scheduler failed {self._num_failures} times in a row, last with {why}")
                )

    def _question(self, waiting: Sequence[JobId]) -> SchedulingRound:
        return SchedulingRound(
            queue=tuple(self._entries[job_id].problem for job_id in waiting),
            held=tuple(
                HeldMemory(job_id=row.job_id, agent_id=row.agent_id, bytes=row.bytes)
                for row in self._store.reservations()
            ),
            budgets_bytes={str(device.agent_id): device.memory_budget_bytes for device in self._fleet.devices},
        )
