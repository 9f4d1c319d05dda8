"""A sweep as people hand it in and see it: trials, their results, and which of them to take."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from plutino.errors import ConfigError
from plutino.job.spec import JobSpec


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Trial(_Value):
    """One job of a sweep."""

    settings: dict[str, str]
    """What distinguishes it from the others, as it was written."""
    spec: JobSpec


class Halving(_Value):
    """Successive halving (Jamieson and Talwalkar 2016, arXiv:1502.07943): short jobs first."""

    eta: int = Field(3, ge=2)
    """Of so many trials one goes on, with so many times the steps."""
    min_steps: int = Field(1, ge=1)
    """No job has fewer steps."""


class SweepSpec(_Value):
    """Everything that a sweep does."""

    name: str
    trials: tuple[Trial, ...]
    halving: Halving | None = None
    """None: every trial runs in full."""
    trains: bool = True
    """False: trials only score, with adapters that are there; none is recommended, and none is trained once more."""

    @model_validator(mode="after")
    def _steps_are_known(self) -> SweepSpec:
        if self.halving is not None and any(trial.spec.training.steps is None for trial in self.trials):
            raise ConfigError("--halving divides training.steps; set it, in place of epochs")
        return self


class TrialResult(_Value):
    """What is known of a trial's latest job."""

    trial: int
    """Counted from 0."""
    settings: dict[str, str]
    rung: int = 0
    """How often it was promoted."""
    job_id: str | None = None
    state: str = "waiting"
    """A job's state; waiting before its first job, dropped once halving has left it behind."""
    reason: str = ""
    steps: int = 0
    """Steps done."""
    score: float | None = None
    """On the held-out rows, between 0 and 1, of several tasks their mean; None without scoring, or where its metric is
    no share of rows, so that the held-out loss compares trials."""
    num_scored: int = 0
    values: dict[str, float] = Field(default_factory=dict)
    """All that scoring measured, by name, with the task's before it where there are several."""
    eval_loss: float | None = None
    """The lowest, where the best state is kept; else the last."""
    trained_params: int = 0
    trained_share: float = 0.0
    """Of the base model's parameters."""
    peak_bytes: int = 0
    """Resident memory of the worker that needed most; 0 before the first step."""
    train_s: float = 0.0
    """Seconds of all steps."""
    total_s: float = 0.0
    """From handing the job in to its end."""

    @property
    def is_measured(self) -> bool:
        """Whether it can be compared."""
        return self.state == "succeeded" and (self.score is not None or self.eval_loss is not None)


class Recommendation(_Value):
    """The trial to take."""

    trial: int
    reason: str


class SweepStatus(_Value):
    """A sweep, as far as it has come."""

    sweep_id: str
    name: str
    state: str
    """running, succeeded, failed or cancelled."""
    reason: str = ""
    base_score: float | None = None
    """The base model's, before any training."""
    results: tuple[TrialResult, ...]
    recommendation: Recommendation | None = None
    """Among the trials that were measured so far."""
    adapter_job_id: str | None = None
    """The job that trains the recommended trial once more and publishes its adapter."""
    adapter_dir: str | None = None
    total_s: float = 0.0

    @property
    def has_ended(self) -> bool:
        """Nothing will change any more."""
        return self.state != "running"

    def model_dump_plain(self) -> dict[str, Any]:
        """For JSON."""
        return self.model_dump(mode="json")
