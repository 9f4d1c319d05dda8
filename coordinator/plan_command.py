"""What ``plutino plan`` shows: the plan, its figures, what a change of the fleet would give, and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coordinator.json_output import to_json
from coordinator.scheduling.problem import PlanningProblem
from partitioner.explain import explain
from partitioner.fleet_file import changed
from partitioner.gantt import gantt_svg, gantt_text
from partitioner.plan import Plan, StagePlan
from partitioner.pricing import Candidate
from partitioner.report import PlanReport, play, replayed, report, report_text
from plutino.errors import ConfigError


@dataclass(frozen=True, slots=True)
class WhatIf:
    """A change of the fleet and what it would give."""

    change: str
    plan: Plan | None
    reason: str
    """Why nothing fits; empty where something does."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan with everything that can be said of it."""

    problem: PlanningProblem
    plan: Plan
    candidate: Candidate
    figures: PlanReport
    what_ifs: tuple[WhatIf, ...]


def consider(problem: PlanningProblem, plan: Plan, changes: Sequence[str]) -> Planned:
    """Work out a plan's figures and the changes.

    Raises:
        ConfigError: a change is not understood.
    """
    candidate = replayed(plan, problem.table, problem.shape, problem.devices, problem.links)
    figures = report(
        plan,
        candidate,
        num_rows=problem.num_train_rows,
        batch_rows=problem.shape.batch_rows,
        cached_steps_share=problem.shape.cached_steps_share,
    )
    return Planned(problem, plan, candidate, figures, try_changes(problem, changes))


def try_changes(problem: PlanningProblem, changes: Sequence[str]) -> tuple[WhatIf, ...]:
    """What each change of the fleet would give.

    Raises:
        ConfigError: a change is not understood.
    """
    return tuple(try_change(problem, change) for change in changes)


def try_change(problem: PlanningProblem, change: str) -> WhatIf:
    """Plan again over a changed fleet.

    Raises:
        ConfigError: the change is not understood.
    """
    devices, links = changed(problem.devices, problem.links, change)
    found = problem.model_copy(update={"devices": devices, "links": links}).plan_or_refusal()
    return WhatIf(change, None, found) if isinstance(found, str) else WhatIf(change, found, "")


def plan_text(planned: Planned) -> str:
    """Everything, for a person."""
    parts = [explain(planned.plan), report_text(planned.figures)]
    if planned.what_ifs:
        share = planned.problem.shape.cached_steps_share
        lines = (f"  {_what_if_line(w, planned.plan, share)}\n" for w in planned.what_ifs)
        parts.append("what if:\n" + "".join(lines))
    parts.append(gantt_text(play(planned.plan, planned.candidate), _names(planned.plan)))
    return "\n".join(parts)


def refused_text(refusal: str, what_ifs: Sequence[WhatIf], *, as_json: bool) -> str:
    """What changes would give to a job that does not fit as things are."""
    if as_json:
        return to_json({"refusal": refusal, "what_if": _what_if_values(what_ifs)}) + "\n"
    return "what if:\n" + "".join(f"  {_what_if_line(what_if, None, 0.0)}\n" for what_if in what_ifs)


def plan_values(planned: Planned) -> dict[str, Any]:
    """Everything, for a program."""
    return planned.plan.model_dump(mode="json") | {
        "figures": planned.figures.model_dump(mode="json"),
        "what_if": _what_if_values(planned.what_ifs),
    }


def _what_if_values(what_ifs: Sequence[WhatIf]) -> list[dict[str, Any]]:
    return [
        {
            "change": what_if.change,
            "step_s": None if what_if.plan is None else what_if.plan.step_s,
            "devices": [] if what_if.plan is None else [_stage_name(stage) for stage in what_if.plan.stages],
            "reason": what_if.reason,
        }
        for what_if in what_ifs
    ]


def write_gantt(planned: Planned, path: Path) -> None:
    """The predicted step as a picture.

    Raises:
        ConfigError: the file cannot be written.
    """
    title = f"one optimiser step, {planned.plan.step_s:.3g} s predicted"
    picture = gantt_svg(play(planned.plan, planned.candidate), _names(planned.plan), title=title)
    try:
        path.write_text(picture)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}; choose another file for --gantt") from error


def _what_if_line(what_if: WhatIf, plan: Plan | None, cached_steps_share: float) -> str:
    """A change in words; steps from the cache count in how fast it is."""
    if what_if.plan is None:
        return f"{what_if.change}: {what_if.reason}"
    stages = ", ".join(_stage_name(stage) for stage in what_if.plan.stages)
    step_s = what_if.plan.mean_step_s(cached_steps_share)
    gain = "it fits" if plan is None else f"{plan.mean_step_s(cached_steps_share) / step_s:.2f} x as fast"
    mean = " over the whole job" if cached_steps_share and plan is not None else ""
    return f"{what_if.change}: {step_s:.3g} s a step{mean}, {gain}, on {stages}"


def _stage_name(stage: StagePlan) -> str:
    return " + ".join(stage.device_names)


def _names(plan: Plan) -> list[tuple[str, ...]]:
    return [stage.device_names for stage in plan.stages]
