"""What ``method: auto`` takes: every candidate is planned on the fleet, and the seconds of the whole task decide. Pure.

Entry points: :func:`candidates`, :func:`priced`, :func:`choose`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from coordinator.jobs.phases import with_cached_step
from coordinator.scheduling.problem import PlanningProblem
from partitioner.cached_epoch import entry_bytes
from partitioner.plan import Plan
from plutino.data.batches import steps_per_epoch
from plutino.errors import InfeasiblePlanError, PlutinoError
from plutino.job.auto_method import AutoMethod, PricedMethod
from plutino.job.method import AdaptersConfig, LoraConfig, MethodConfig, ParallelAdaptersConfig
from plutino.job.spec import JobSpec
from plutino.sizes import format_size

MUST_SAVE = 0.1
"""LoRA is what most tools load and what merges into the base: another method must save this share of its seconds."""


@dataclass(frozen=True, slots=True)
class Option:
    """A method that could be taken."""

    name: str
    spec: JobSpec | None
    """The job with it; None: it does not go with the job's other settings."""
    why_not: str = ""


@dataclass(frozen=True, slots=True)
class PlannedOption:
    """The same on a fleet."""

    option: Option
    priced: PricedMethod
    problem: PlanningProblem | None = None
    plan: Plan | None = None
    """None: it does not fit, or could not be measured."""


def is_open(spec: JobSpec) -> bool:
    """Whether a job's method is still to be chosen."""
    return spec.auto_method is not None and spec.auto_method.is_open


def has_later_epochs(spec: JobSpec, num_train_rows: int, total_steps: int) -> bool:
    """Whether rows come again, so that what the blocks give of them is worth keeping."""
    return total_steps > steps_per_epoch(num_train_rows, spec.training.batch_size)


def candidates(spec: JobSpec, *, has_later_epochs: bool) -> tuple[Option, ...]:
    """LoRA, Houlsby's adapters, and parallel adapters without and with a cache of what the blocks give.

    Reading may take longer than computing, so that the cache is an option of its own where the job leaves it off.
    """
    asked = spec.training.activation_cache
    found = [
        _option("lora", spec, LoraConfig(), "off"),
        _option("adapters, houlsby", spec, AdaptersConfig(placement="houlsby"), "off"),
    ]
    if asked == "off":
        found.append(_option("parallel_adapters", spec, ParallelAdaptersConfig(), "off"))
    cache = asked if asked != "off" else "raw" if has_later_epochs else "off"
    if cache != "off":
        found.append(_option(f"parallel_adapters, activation cache {cache}", spec, ParallelAdaptersConfig(), cache))
    return tuple(found)


def _option(name: str, spec: JobSpec, method: MethodConfig, cache: str) -> Option:
    values = spec.model_dump()
    values |= {"method": method.model_dump(), "auto_method": None}
    values["training"] |= {"activation_cache": cache}
    try:
        return Option(name, JobSpec.model_validate(values))
    except ValidationError as error:
        return Option(name, None, str(error.errors()[0]["msg"]).removeprefix("Value error, "))


def refused(option: Option, why: str | PlutinoError) -> PlannedOption:
    """An option that cannot be taken."""
    return PlannedOption(option, PricedMethod(method=option.name, why_not=str(why)))


def priced(option: Option, problem: PlanningProblem, plan: Plan, total_steps: int) -> PlannedOption:
    """An option with its plan and what that costs over the whole task."""
    assert option.spec is not None, "only asked where the job can have the method"
    spec, shape = option.spec, problem.shape
    plan = with_cached_step(plan, problem, spec, total_steps=total_steps)
    num_first = min(total_steps, steps_per_epoch(problem.num_train_rows, spec.training.batch_size))
    later_s = plan.step_s if plan.later_step_s is None else plan.later_step_s
    row_bytes = 0
    if spec.training.activation_cache != "off":
        row_bytes = entry_bytes(problem.table, shape, shape.entry_token_bytes) // shape.micro_batch_rows
    outside = shape.first_trainable_params + shape.last_trainable_params + shape.stage_trainable_params
    return PlannedOption(
        option,
        PricedMethod(
            method=option.name,
            task_s=num_first * plan.step_s + (total_steps - num_first) * later_s,
            step_s=plan.step_s,
            later_step_s=later_s,
            peak_bytes=max(replica.peak_bytes for stage in plan.stages for replica in stage.replicas),
            sent_bytes=sum(link.down_bytes + link.up_bytes for link in plan.links),
            cache_bytes=problem.num_train_rows * row_bytes,
            trained_params=sum(shape.adapter_params) + outside,
        ),
        problem,
        plan,
    )


def choose(planned: Sequence[PlannedOption], total_steps: int) -> tuple[PlannedOption, AutoMethod]:
    """The option to take, and everything that decided.

    Raises:
        InfeasiblePlanError: none can be taken.
    """
    fitting = [one for one in planned if one.plan is not None]
    if not fitting:
        reasons = {one.priced.why_not: one.priced.method for one in planned}
        told = (
            "; ".join(f"{method}: {why}" for why, method in reasons.items())
            if len(reasons) > 1
            else next(iter(reasons))
        )
        raise InfeasiblePlanError(f"method: auto finds no method that the devices can train: {told}")
    shortest = min(fitting, key=lambda one: one.priced.task_s)
    first = fitting[0]
    taken = shortest if shortest.priced.task_s < (1 - MUST_SAVE) * first.priced.task_s else first
    others = [one for one in fitting if one is not taken]
    told = " or ".join(f"{one.priced.task_s:.3g} s with {one.priced.method}" for one in others)
    why = (
        f"{taken.priced.method}: {taken.priced.task_s:.3g} s for {total_steps} steps on these devices, its largest "
        f"worker takes {format_size(taken.priced.peak_bytes)}"
    )
    if told:
        why += f"; against {told}"
    if taken is not shortest:
        why += f", none of which saves {MUST_SAVE:.0%}"
    why += ". Seconds say nothing of quality: to choose by that, name a method"
    return taken, AutoMethod(why=why, num_steps=total_steps, candidates=tuple(one.priced for one in planned))


def settled(taken: PlannedOption, choice: AutoMethod) -> tuple[JobSpec, PlanningProblem, Plan]:
    """The job with the method that was taken, and its plan, both with the choice."""
    spec, problem, plan = taken.option.spec, taken.problem, taken.plan
    assert spec is not None and problem is not None and plan is not None, "only what fits is taken"
    return (
        spec.model_copy(update={"auto_method": choice}),
        problem.model_copy(update={"method_choice": choice}),
        plan.model_copy(update={"method_choice": choice}),
    )
