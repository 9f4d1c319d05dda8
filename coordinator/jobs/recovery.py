"""What a job does after workers or links were lost: pure, always with its reason.

Entry point: :func:`decide_recovery`. A step count R names the state before step R, after R steps. The state of a lost
worker exists nowhere but in its shadows, and one worker's state is worth nothing without the same step's state of all
others: so all stages return together to the newest step whose shadows cover every parameter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from coordinator.jobs.events import Event, Failed, Interrupted, WorkersLost
from coordinator.jobs.lineage import BestSoFar
from plutino.types import WorkerRef

MAX_RESUMES_PER_STEP = 3
"""A link that breaks again and again on one step is as good as lost: then the plan must change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shadow:
    """Training state of some parameters, verified on the coordinator's disk."""

    shadow_id: str
    step: int
    """Number of steps done when it was taken."""
    plan_epoch: int
    """Plan epoch of the worker that sent it."""
    sha256: str
    bytes: int
    parameter_names: tuple[str, ...]
    """Global names whose value and moments it holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Incident:
    """What is known when a job was disturbed."""

    reason: str
    """What happened, for a person."""
    lost: tuple[WorkerRef, ...]
    """Workers whose memory is gone; empty if only links or the coordinator failed."""
    next_step: int
    """First step neither committed nor skipped."""
    parameter_names: frozenset[str]
    """All trainable parameters of the job; empty before the first load was complete."""
    shadows: tuple[Shadow, ...]
    recoveries: int
    """How often the job has gone back before."""
    max_recoveries: int
    resumes_at_step: int = 0
    """How often the job was resumed at this very step before."""
    num_devices_left: int = 1
    """Devices that could carry a new plan, those included that said goodbye a moment ago and may be on their way back.
    Whether one fits is for the planner to say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resume:
    """Nothing is lost: repair the links and run the current step again."""

    step: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReturnTo:
    """All stages load the state of a durable step."""

    step: int
    shadows: Mapping[str, str]
    """Shadow id -> sha256; together they hold every parameter."""
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Restart:
    """No durable step exists yet: begin again at step 0, from the same initial adapters."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Park:
    """No device is left: wait for one, then start from ``step``."""

    step: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Fail:
    """The job has used up its recoveries."""

    reason: str


Decision = Resume | ReturnTo | Restart | Park | Fail


def decide_recovery(incident: Incident) -> Decision:
    """What to do about an incident."""
    lost = _name_lost(incident)
    if not incident.lost and incident.resumes_at_step < MAX_RESUMES_PER_STEP:
        return Resume(
            step=incident.next_step,
            reason=f"{incident.reason}; every worker still has its state, so step {incident.next_step} is run again",
        )
    if incident.recoveries >= incident.max_recoveries:
        return Fail(
            reason=f"{incident.reason} ({lost}); the job has recovered {incident.recoveries} times and may do so "
            f"{incident.max_recoveries} times: see why its workers end, or raise placement.max_recoveries"
        )
    durable = durable_steps(incident.shadows, incident.parameter_names)
    step = max((step for step in durable if step <= incident.next_step), default=0)
    undone = incident.next_step - step
    back = f"{undone} {'step is' if undone == 1 else 'steps are'} run again"
    if incident.num_devices_left <= 0:
        return Park(
            step=step,
            reason=f"{incident.reason} ({lost}); no device is left, the job goes on from step {step} when one joins",
        )
    if step == 0:
        return Restart(
            reason=f"{incident.reason} ({lost}); no step is durable yet, the job begins again at step 0 and {back}"
        )
    return ReturnTo(
        step=step,
        shadows={shadow.shadow_id: shadow.sha256 for shadow in durable[step]},
        reason=f"{incident.reason} ({lost}); step {step} is the newest durable one, {back}",
    )


def recovery_event(decision: Decision, best: BestSoFar) -> Event:
    """The state machine's event for a decision; ``best`` judges the evaluations up to the step returned to."""
    match decision:
        case Resume(reason=reason):
            return Interrupted(reason=reason)
        case ReturnTo(step=step, reason=reason):
            return WorkersLost(next_step=step, best=best, reason=reason)
        case Restart(reason=reason):
            return WorkersLost(next_step=0, best=best, reason=reason)
        case Park(step=step, reason=reason):
            return WorkersLost(next_step=step, best=best, reason=reason, is_parked=True)
        case Fail(reason=reason):
            return Failed(reason=reason)


def durable_steps(shadows: Iterable[Shadow], parameter_names: frozenset[str]) -> dict[int, tuple[Shadow, ...]]:
    """Steps whose shadows hold every parameter, each with shadows that suffice, by id.

    Without parameter names nothing is durable: the job has not finished loading once.
    """
    by_step: dict[int, list[Shadow]] = {}
    for shadow in sorted(shadows, key=lambda shadow: shadow.shadow_id):
        by_step.setdefault(shadow.step, []).append(shadow)
    durable: dict[int, tuple[Shadow, ...]] = {}
    for step, candidates in sorted(by_step.items()):
        missing = set(parameter_names)
        chosen: list[Shadow] = []
        for shadow in candidates:
            if not missing.isdisjoint(shadow.parameter_names):
                chosen.append(shadow)
                missing.difference_update(shadow.parameter_names)
        if chosen and not missing:
            durable[step] = tuple(chosen)
    return durable


def obsolete_shadows(
    shadows: Iterable[Shadow], parameter_names: frozenset[str], *, pinned_steps: frozenset[int], num_kept: int = 2
) -> tuple[Shadow, ...]:
    """Shadows that no recovery will need.

    Kept are the newest ``num_kept`` durable steps, the pinned steps (that of the best evaluation; the one a plan is
    loading from) and whatever is newer than the newest durable step, because the rest of it may still be on its way.
    """
    shadows = tuple(shadows)
    durable = sorted(durable_steps(shadows, parameter_names))
    if not durable:
        return ()
    kept = pinned_steps | set(durable[-num_kept:])
    return tuple(shadow for shadow in shadows if shadow.step < durable[-1] and shadow.step not in kept)


def _name_lost(incident: Incident) -> str:
    if not incident.lost:
        return f"links broke {incident.resumes_at_step} times on step {incident.next_step}"
    return "lost: " + ", ".join(f"stage {ref.stage_index}.{ref.replica_index}" for ref in sorted(incident.lost))


def outcome_of(decision: Decision, next_step: int) -> tuple[int, str]:
    """The step that a job goes on from, and what people call the decision."""
    match decision:
        case Resume(step=step):
            return step, "resume"
        case ReturnTo(step=step):
            return step, "return"
        case Restart():
            return 0, "restart"
        case Park(step=step):
            return step, "park"
        case Fail():
            return next_step, "fail"
