"""A round of scheduling as a value that can cross a process border: who waits, who offers, what is taken.

:func:`solve` is what the Scheduler actor runs: from JSON to JSON around :func:`coordinator.scheduling.scheduler.decide`
with the real planner. It is a pure function; what it remembers only saves time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from coordinator.scheduling.plan_memory import PlanMemory
from coordinator.scheduling.problem import PlanningProblem
from coordinator.scheduling.scheduler import (
    Decision,
    Offer,
    Park,
    QueuedJob,
    Refuse,
    Reservation,
    Reserve,
    Wait,
    decide,
)
from partitioner.plan import Plan
from partitioner.spread import Fan, in_turn
from partitioner.values import PlanValue
from plutino.types import AgentId, JobId

FanOf = Callable[[PlanningProblem], Fan]
"""What runs the parts of a problem's search, if that is long."""

_memory = PlanMemory()


class HeldMemory(PlanValue):
    """A reservation."""

    job_id: str
    agent_id: str
    bytes: int


class SchedulingRound(PlanValue):
    """The whole question."""

    queue: tuple[PlanningProblem, ...]
    held: tuple[HeldMemory, ...]
    budgets_bytes: dict[str, int]
    """Budget of every device that is in."""


class Verdict(PlanValue):
    """The answer for one job."""

    job_id: str
    kind: Literal["reserve", "wait", "park", "refuse"]
    reason: str = ""
    plan: Plan | None = None
    held: tuple[HeldMemory, ...] = ()


class SchedulingAnswer(PlanValue):
    """The whole answer, in the queue's order."""

    verdicts: tuple[Verdict, ...]


def solve(round_json: str, fan_of: FanOf = lambda problem: in_turn) -> str:
    """Decide a round; JSON of :class:`SchedulingRound` in, of :class:`SchedulingAnswer` out."""
    question = SchedulingRound.model_validate_json(round_json)
    problems = {JobId(problem.job_id): problem for problem in question.queue}

    def search(problem: PlanningProblem) -> Plan:
        return problem.plan(fan_of(problem))

    plans = {job_id: _memory.remembering(problem, search) for job_id, problem in problems.items()}
    decisions = decide(
        [QueuedJob(job_id=job_id, profiles=p.devices, is_started=p.is_started) for job_id, p in problems.items()],
        [Reservation(job_id=JobId(h.job_id), agent_id=AgentId(h.agent_id), bytes=h.bytes) for h in question.held],
        [Offer(agent_id=AgentId(agent), budget_bytes=budget) for agent, budget in question.budgets_bytes.items()],
        lambda job_id, profiles: plans[job_id](profiles),
    )
    return SchedulingAnswer(verdicts=tuple(_verdict(decision) for decision in decisions)).model_dump_json()


def _verdict(decision: Decision) -> Verdict:
    match decision:
        case Reserve(job_id=job_id, plan=plan, reservations=rows):
            held = tuple(HeldMemory(job_id=row.job_id, agent_id=row.agent_id, bytes=row.bytes) for row in rows)
            return Verdict(job_id=job_id, kind="reserve", plan=plan, held=held)
        case Wait(job_id=job_id, reason=reason):
            return Verdict(job_id=job_id, kind="wait", reason=reason)
        case Park(job_id=job_id, reason=reason):
            return Verdict(job_id=job_id, kind="park", reason=reason)
        case Refuse(job_id=job_id, reason=reason):
            return Verdict(job_id=job_id, kind="refuse", reason=reason)
