"""What one run showed, from its job's events."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from partitioner.plan import Plan
from plutino.events import DataRead, JobEvent, JobStateChanged, PlanChanges, PlanMade, StepCommitted

Seen = Sequence[tuple[float, JobEvent]]
"""Events with the seconds since the submit at which they were heard."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFigures:
    """Seconds and bytes of one run; a run of another program leaves what it does not know at its default."""

    total_s: float
    """From the submit to the saved adapter."""
    first_epoch_s: float
    """Its steps."""
    later_epochs_s: tuple[float, ...]
    num_steps: int
    """Of an epoch."""
    step_s: tuple[float, ...] = ()
    """Median of each epoch, its first step left out."""
    begin_s: float = 0.0
    """From the submit to the first step's beginning: profile, plan, loading."""
    moves_s: tuple[float, ...] = ()
    """From one phase's last step until the next one's workers run."""
    end_s: float = 0.0
    """After the last step: verification, saving."""
    job_bytes: Mapping[str, int] | None = None
    """Peak by device in the first epoch, over what a worker takes before any job."""
    cached_job_bytes: Mapping[str, int] | None = None
    """The same of workers that train from the cache without the backbone."""
    rss_bytes: Mapping[str, int] | None = None
    """Peak of a device's worker, everything counted."""
    sent_bytes: Mapping[str, int] | None = None
    """By device, in the whole run."""
    tokens: int = 0
    """Of an epoch."""
    cached_bytes: int = 0
    """Of entries on all devices' disks."""
    plans: tuple[str, ...] = ()
    losses: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def epoch_s(self) -> tuple[float, ...]:
        """Seconds of every epoch's steps."""
        return (self.first_epoch_s, *self.later_epochs_s)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def figures_of(seen: Seen, *, batch_size: int, cached_bytes: int = 0, notes: Sequence[str] = ()) -> RunFigures:
    """A run's figures.

    Args:
        seen: all events of a job that succeeded.
        batch_size: rows of a step.
        cached_bytes: of entries on the disks.
        notes: what whoever reads the figures should know.
    """
    steps = [event for _, event in seen if isinstance(event, StepCommitted)]
    num_rows = next(event.num_train_rows for _, event in seen if isinstance(event, DataRead))
    num_steps = -(-num_rows // batch_size)
    epochs = [steps[first : first + num_steps] for first in range(0, len(steps), num_steps)]
    at_s = {event.step: heard_s for heard_s, event in seen if isinstance(event, StepCommitted)}
    plans = {
        event.plan_epoch: Plan.model_validate_json(event.plan_json) for _, event in seen if isinstance(event, PlanMade)
    }
    cached = {epoch for epoch, plan in plans.items() if plan.from_cache}
    return RunFigures(
        total_s=seen[-1][0],
        first_epoch_s=sum(step.seconds for step in epochs[0]),
        later_epochs_s=tuple(sum(step.seconds for step in epoch) for epoch in epochs[1:]),
        num_steps=num_steps,
        step_s=tuple(statistics.median(step.seconds for step in (epoch[1:] or epoch)) for epoch in epochs),
        begin_s=at_s[0] - steps[0].seconds,
        moves_s=_moves_s(seen),
        end_s=seen[-1][0] - at_s[steps[-1].step],
        job_bytes=_job_bytes(steps, plans, set(plans) - cached),
        cached_job_bytes=_job_bytes(steps, plans, cached) or None,
        rss_bytes=_peaks(steps, {step.plan_epoch for step in steps}),
        sent_bytes=_sent_bytes(steps),
        tokens=sum(step.tokens for step in epochs[0]),
        cached_bytes=cached_bytes,
        plans=tuple(dict.fromkeys(_plan_text(plan) for plan in plans.values())),
        losses=tuple(step.loss for step in steps),
        notes=tuple(notes),
    )


def _moves_s(seen: Seen) -> tuple[float, ...]:
    running_s = [heard_s for heard_s, e in seen if isinstance(e, JobStateChanged) and e.state == "running"]
    changes_s = [heard_s for heard_s, event in seen if isinstance(event, PlanChanges)]
    return tuple(
        next((found_s - change_s for found_s in running_s if found_s > change_s), 0.0) for change_s in changes_s
    )


def _peaks(steps: Sequence[StepCommitted], plan_epochs: set[int]) -> dict[str, int]:
    peaks: dict[str, int] = {}
    for step in steps:
        if step.plan_epoch in plan_epochs:
            for worker in step.workers:
                name = worker.worker.device_name
                peaks[name] = max(peaks.get(name, 0), worker.peak_rss_bytes)
    return peaks


def _job_bytes(steps: Sequence[StepCommitted], plans: Mapping[int, Plan], plan_epochs: set[int]) -> dict[str, int]:
    baselines = {
        replica.device_name: replica.baseline_bytes
        for plan in plans.values()
        for stage in plan.stages
        for replica in stage.replicas
    }
    return {name: peak - baselines[name] for name, peak in _peaks(steps, plan_epochs).items()}


def _sent_bytes(steps: Sequence[StepCommitted]) -> dict[str, int]:
    # A worker counts from its own start, and a plan of its own has workers of its own.
    last: dict[tuple[int, str], int] = {}
    for step in steps:
        for worker in step.workers:
            last[step.plan_epoch, worker.worker.device_name] = worker.sent_bytes
    found: dict[str, int] = {}
    for (_, name), num_bytes in last.items():
        found[name] = found.get(name, 0) + num_bytes
    return found


def _plan_text(plan: Plan) -> str:
    stages = ", ".join(f"{' + '.join(s.device_names)} [{s.start_block}, {s.end_block})" for s in plan.stages)
    return f"{stages}; {plan.micro_batch_rows} rows a micro-batch{', from the cache' if plan.from_cache else ''}"
