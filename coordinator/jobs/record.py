"""What is true of a job: its state and its record, one row of the store."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from plutino.types import JobId


class JobState(str, Enum):
    """Where a job is in its life."""

    SUBMITTED = "submitted"
    """Accepted; its rows are being read."""
    PLANNING = "planning"
    """Waits for a plan and for the memory it needs."""
    LOADING = "loading"
    """Workers start and load their stages, for the first time."""
    RUNNING = "running"
    RECOVERING = "recovering"
    """Fenced after a loss: waits for a new plan, or for its workers to load."""
    PAUSED = "paused"
    """Stopped between two steps at a person's wish; workers keep their memory."""
    PARKED = "parked"
    """Too few devices; goes on by itself."""
    FINALIZING = "finalizing"
    """Trained; the adapter is being assembled and verified."""
    SUCCEEDED = "succeeded"
    CANCELLED = "cancelled"
    FAILED = "failed"


TERMINAL_STATES = frozenset({JobState.SUCCEEDED, JobState.CANCELLED, JobState.FAILED})


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRecord:
    """All that is true of a job beside its ledger; one row of the store."""

    job_id: JobId
    name: str
    spec_json: str
    submitted_at_s: float
    """Seconds since 1970, UTC."""
    state: JobState = JobState.SUBMITTED
    reason: str = ""
    """Why the job is in this state, for a person."""
    plan_json: str | None = None
    """The plan of this plan epoch; None until there is one."""
    plan_epoch: int = 1
    """Generation of the plan that is made or run; everything of an older one is stale."""
    numerics_json: str | None = None
    """None before the first plan."""
    parameter_names: tuple[str, ...] = ()
    """Global names of all trainable parameters, sorted; empty before the first load was complete."""
    recoveries: int = 0
    """How often the job has gone back to an earlier step."""
    start_step: int = 0
    """The step this plan epoch's workers start from: 0, or a durable one."""
    next_step: int = 0
    """First step neither committed nor skipped."""
    total_steps: int = 0
    """Length of the learning-rate schedule; 0 until the rows are read."""
    final_step: int | None = None
    """Steps after which training was found complete; smaller than total_steps if it stopped early, None before."""
    best_step: int | None = None
    """Number of steps done at the lowest evaluation loss; None before the first evaluation."""
    best_eval_loss: float | None = None
    evaluations_since_best: int = 0
    ended_at_s: float | None = None
    """None while the job is alive."""
    adapter_dir: str | None = None
    """None before the adapter is published."""

    @property
    def is_terminal(self) -> bool:
        """Whether the job has ended, one way or another."""
        return self.state in TERMINAL_STATES

    @property
    def end_step(self) -> int:
        """Number of steps after which training is complete."""
        return self.total_steps if self.final_step is None else self.final_step
