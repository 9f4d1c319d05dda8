"""What can happen to a job: the events of its state machine.

These are the input of :func:`coordinator.jobs.state.transition`; what a person sees of a job is in ``plutino.events``.
"""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.jobs.lineage import BestSoFar


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened to a job."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataPrepared(Event):
    """The runner has read all rows."""

    total_steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Queued(Event):
    """The job waits for memory."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned(Event):
    """A plan was made and its memory reserved (in the same write)."""

    plan_json: str
    numerics_json: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AllLoaded(Event):
    """Every worker of the plan has its stage in memory, and all its streams are up."""

    parameter_names: tuple[str, ...]
    """Union of the stages' global names, sorted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCommitted(Event):
    """Written with its ledger row, before any worker hears of it."""

    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSkipped(Event):
    """All workers drop the step; written with its ledger row."""

    step: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated(Event):
    """An evaluation loss was measured; written with its row."""

    best: BestSoFar
    """The verdict with the new row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PauseRequested(Event):
    """A person wants the job to stop between steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumeRequested(Event):
    """A person wants a paused job to go on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interrupted(Event):
    """Links broke, but no worker lost its state: plan and plan epoch stay."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkersLost(Event):
    """Some worker's state is gone: the plan is fenced and all stages return to a durable step."""

    next_step: int
    """The durable step returned to, or 0."""
    best: BestSoFar
    """The verdict over the evaluations up to that step."""
    reason: str
    is_parked: bool = False
    """No device is left to plan over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveDecided(Event):
    """Another plan is worth moving to: the step that was reached is durable, nothing is undone."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Parked(Event):
    """The devices that are left cannot carry the job."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingDone(Event):
    """Every step is decided, or early stopping has spoken."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported(Event):
    """The adapter is verified and published, or the job is done without one."""

    adapter_dir: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelRequested(Event):
    """A person wants the job to end."""

    reason: str = "cancelled by its owner"


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed(Event):
    """The job cannot go on."""

    reason: str
