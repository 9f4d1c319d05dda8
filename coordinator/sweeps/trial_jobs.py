"""A sweep's trials as jobs: how they are found again, their specs, and what those of the same stages share; pure."""

from __future__ import annotations

import json

from coordinator.jobs.context import TrialTerms
from coordinator.sweeps.choose import Rung, plan_rungs
from plutino.errors import ConfigError
from plutino.job.spec import JobSpec
from plutino.sweep import SweepSpec


def trial_key(sweep_id: str, number: int, rung: int) -> str:
    """The idempotency key of a trial's job."""
    return f"sweep/{sweep_id}/{number}/{rung}"


def adapter_key(sweep_id: str) -> str:
    """The idempotency key of the job that trains the recommended trial once more."""
    return f"sweep/{sweep_id}/adapter"


def check_halving(spec: SweepSpec) -> None:
    """Refuse halving that would promote nothing.

    Raises:
        ConfigError: a first round would have too few steps, or one trial goes on from one.
    """
    halving = spec.halving
    if halving is None or len(rungs_of(spec)) > 1:
        return
    steps = min(trial.spec.training.steps or 0 for trial in spec.trials)
    shorter = steps // halving.eta
    way_out = f"give --min-steps {shorter} or less, or " if shorter else ""
    raise ConfigError(
        f"--halving has nothing to halve: training.steps is {steps}, a round before it would have {shorter} steps, and "
        f"--min-steps asks for {halving.min_steps}; {way_out}raise training.steps to {halving.eta * halving.min_steps}"
    )


def rungs_of(spec: SweepSpec) -> tuple[Rung, ...]:
    """A sweep's rounds."""
    steps = [trial.spec.training.steps for trial in spec.trials]
    known = [number for number in steps if number is not None]
    return plan_rungs(len(steps), min(known) if len(known) == len(steps) else None, spec.halving)


def trial_job(sweep: SweepSpec, number: int, rung: Rung, *, is_first: bool) -> JobSpec:
    """A trial's job: it publishes nothing, and only the first one measures the base model."""
    spec = sweep.trials[number].spec
    training = spec.training
    if rung.steps is not None:
        # Its own schedule within fewer steps, the warm-up shortened alike.
        share = rung.steps / (training.steps or rung.steps)
        training = training.model_copy(update={"steps": rung.steps, "warmup_steps": int(training.warmup_steps * share)})
    scoring = spec.scoring
    if scoring is not None and not is_first:
        scoring = scoring.model_copy(update={"before": False, "few_shot": 0})
    return spec.model_copy(
        update={
            "name": f"{sweep.name}-{number + 1}",
            "training": training,
            "scoring": scoring,
            # The published adapter's job measures it.
            "evaluation": spec.evaluation.model_copy(update={"measure_general": "never"}),
            "output": spec.output.model_copy(update={"publish": False, "dir": None}),
        }
    )


def group_of(spec: JobSpec) -> str:
    """Jobs with the same value differ in method and training settings alone, so that one plan can hold each of them."""
    kept = {"batch_size", "micro_batch_size", "micro_batch_cut", "checkpointing"}
    return json.dumps(
        {
            "model": spec.model.model_dump(mode="json"),
            "data": spec.data.model_dump(mode="json"),
            "objective": spec.objective.model_dump(mode="json"),
            "placement": spec.placement.model_dump(mode="json"),
            "scoring": None
            if spec.scoring is None
            else spec.scoring.model_dump(mode="json", exclude={"before", "few_shot", "rows", "metric"}),
            "training": spec.training.model_dump(mode="json", include=kept),
        },
        sort_keys=True,
    )


def first_of_group(sweep: SweepSpec, number: int) -> int:
    """The first trial that can share its stages with this one."""
    wanted = group_of(sweep.trials[number].spec)
    return next(other for other, trial in enumerate(sweep.trials) if group_of(trial.spec) == wanted)


def shared_terms(sweep: SweepSpec, keeps_stage_s: float) -> dict[str, TrialTerms]:
    """What the trials of each group share."""
    groups: dict[str, list[JobSpec]] = {}
    for trial in sweep.trials:
        groups.setdefault(group_of(trial.spec), []).append(trial.spec)
    return {group: TrialTerms(specs=tuple(specs), keeps_stage_s=keeps_stage_s) for group, specs in groups.items()}
