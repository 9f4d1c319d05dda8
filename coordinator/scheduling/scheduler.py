"""Who gets which devices: all or none of a plan's memory, first come, first served, with backfill.

Entry point: :func:`decide`, a pure function. The first job that must wait is the *head*. A later job may start before
it (backfill) only if it cannot delay the head in any order in which the running jobs may end. That is checked, not
estimated: for every smallest set of running jobs whose end would let the head start, the head must still fit with the
candidate in place. This rests on one property of the planner: more free memory never makes a job infeasible. How long
a job runs, which nobody knows, is not needed.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from partitioner.device import DeviceProfile
from partitioner.plan import Plan
from plutino.errors import InfeasiblePlanError
from plutino.types import AgentId, JobId

MAX_RUNNING_FOR_BACKFILL = 5
"""The check looks at up to 2^n sets of running jobs, a plan search each; with more jobs running, nobody overtakes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """Memory of one device that belongs to one job."""

    job_id: JobId
    agent_id: AgentId
    bytes: int
    """Predicted peak of the job's workers on the device together, baselines included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What a device that is in gives to all jobs together."""

    agent_id: AgentId
    budget_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class QueuedJob:
    """A job that waits for its devices."""

    job_id: JobId
    profiles: tuple[DeviceProfile, ...]
    """Devices that the job may use, measured at its shape; what is available on them is filled in here."""
    is_started: bool = False
    """It has run before: it waits for devices to come back, and is never refused."""


Planner = Callable[[JobId, tuple[DeviceProfile, ...]], Plan]
"""A plan over these devices with this much available on each; raises InfeasiblePlanError."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserve:
    """The job gets this plan and these reservations, in one write."""

    job_id: JobId
    plan: Plan
    reservations: tuple[Reservation, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """The job stays queued until other jobs end."""

    job_id: JobId
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Park:
    """A job that has run before does not fit what is left, even with all of it to itself."""

    job_id: JobId
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Refuse:
    """The job would not fit even if no other job ran."""

    job_id: JobId
    reason: str


Decision = Reserve | Wait | Park | Refuse


def decide(
    queue: Sequence[QueuedJob], reservations: Iterable[Reservation], offers: Iterable[Offer], planner: Planner
) -> tuple[Decision, ...]:
    """One decision for every queued job, in the queue's order (which is that of submission).

    Reservations made by earlier decisions count for the later ones. Reservations on devices that are not offered are
    ignored: the memory they stand for is not there.
    """
    round_ = _Round(tuple(reservations), {offer.agent_id: offer.budget_bytes for offer in offers}, planner)
    head: QueuedJob | None = None
    decisions: list[Decision] = []
    for job in queue:
        decision = round_.place(job, head)
        if head is None and isinstance(decision, Wait):
            head = job
        decisions.append(decision)
    return tuple(decisions)


def reservations_of(job_id: JobId, plan: Plan) -> tuple[Reservation, ...]:
    """What a plan takes of each device, by agent id; a device with several stages gives the sum of them."""
    held: Counter[AgentId] = Counter()
    for stage in plan.stages:
        for replica in stage.replicas:
            held[AgentId(replica.agent_id)] += replica.granted_bytes
    return tuple(Reservation(job_id=job_id, agent_id=agent_id, bytes=held[agent_id]) for agent_id in sorted(held))


class _Round:
    """The reservations as they grow over one call of :func:`decide`."""

    def __init__(self, held: tuple[Reservation, ...], budgets: dict[AgentId, int], planner: Planner) -> None:
        self._held = held
        self._budgets = budgets
        self._planner = planner

    def place(self, job: QueuedJob, head: QueuedJob | None) -> Decision:
        plan = self._plan(job, self._held)
        if isinstance(plan, InfeasiblePlanError):
            return self._put_off(job, plan)
        wanted = reservations_of(job.job_id, plan)
        self._check_fits(wanted)
        if head is not None:
            obstacle = self._delay(head, wanted)
            if obstacle is not None:
                return Wait(job_id=job.job_id, reason=obstacle)
        self._held += wanted
        return Reserve(job_id=job.job_id, plan=plan, reservations=wanted)

    def _put_off(self, job: QueuedJob, error: InfeasiblePlanError) -> Decision:
        alone = self._plan(job, ())
        if not isinstance(alone, InfeasiblePlanError):
            return Wait(job_id=job.job_id, reason=f"waits for memory: {self._who_holds(job)}")
        if job.is_started:
            return Park(job_id=job.job_id, reason=str(alone))
        return Refuse(job_id=job.job_id, reason=str(alone))

    def _delay(self, head: QueuedJob, wanted: tuple[Reservation, ...]) -> str | None:
        """Why starting now could delay the head, or None if it cannot."""
        running = sorted({row.job_id for row in self._held})
        if len(running) > MAX_RUNNING_FOR_BACKFILL:
            return (
                f"waits behind {head.job_id}: with {len(running)} jobs running (more than {MAX_RUNNING_FOR_BACKFILL}) "
                "nobody overtakes"
            )
        for ended in self._smallest_reliefs(head, running):
            left = tuple(row for row in self._held if row.job_id not in ended)
            if isinstance(self._plan(head, left + wanted), InfeasiblePlanError):
                return f"waits behind {head.job_id}, which needs this memory when {', '.join(sorted(ended))} ends"
        return None

    def _smallest_reliefs(self, head: QueuedJob, running: Sequence[JobId]) -> Iterator[frozenset[JobId]]:
        """Sets of running jobs whose end lets the head start, and of which no smaller part does."""
        found: list[frozenset[JobId]] = []
        for size in range(len(running) + 1):
            for ended in map(frozenset, itertools.combinations(running, size)):
                if any(smaller <= ended for smaller in found):
                    continue
                left = tuple(row for row in self._held if row.job_id not in ended)
                if not isinstance(self._plan(head, left), InfeasiblePlanError):
                    found.append(ended)
                    yield ended

    def _plan(self, job: QueuedJob, held: Iterable[Reservation]) -> Plan | InfeasiblePlanError:
        taken: Counter[AgentId] = Counter()
        for row in held:
            taken[row.agent_id] += row.bytes
        profiles = tuple(
            profile.model_copy(update={"available_bytes": free})
            for profile in job.profiles
            if (free := self._budgets.get(AgentId(profile.agent_id), 0) - taken[AgentId(profile.agent_id)]) > 0
        )
        if not profiles:
            return InfeasiblePlanError(
                f"none of the {len(job.profiles)} devices that the job may use is in with free memory; "
                "let a device join, or see placement.devices"
            )
        try:
            return self._planner(job.job_id, profiles)
        except InfeasiblePlanError as error:
            return error

    def _check_fits(self, wanted: tuple[Reservation, ...]) -> None:
        for row in wanted:
            taken = sum(other.bytes for other in self._held if other.agent_id == row.agent_id)
            free = self._budgets.get(row.agent_id, 0) - taken
            # The planner's own contract; broken, it would let the kernel kill workers of other jobs.
            assert row.bytes <= free, f"the plan takes {row.bytes} bytes of {row.agent_id}, which has {free} free"

    def _who_holds(self, job: QueuedJob) -> str:
        usable = {AgentId(profile.agent_id) for profile in job.profiles} & self._budgets.keys()
        holders: Counter[JobId] = Counter()
        for row in self._held:
            if row.agent_id in usable:
                holders[row.job_id] += row.bytes
        total = sum(self._budgets[agent_id] for agent_id in usable)
        parts = ", ".join(f"{job_id} holds {_gib(holders[job_id])}" for job_id in sorted(holders))
        return f"{parts} of the {_gib(total)} on {len(usable)} devices"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
