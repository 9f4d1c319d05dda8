"""What ``plutino show JOB --gantt`` draws: a recorded step beside its prediction."""

from __future__ import annotations

from pathlib import Path

from coordinator.artifacts.traces import PlannedEpoch
from partitioner.compare import compare, compared_svg, compared_text
from partitioner.gantt import gantt_svg, gantt_text
from partitioner.report import replayed
from partitioner.trace import StepTrace
from plutino.errors import ConfigError, PlanError

TO_STDOUT = "-"


def draw_step(trace: StepTrace, planned: PlannedEpoch | None, *, as_picture: bool) -> str:
    """A recorded step beside its prediction, as text or as SVG; alone where the two cannot be compared, and why.

    Args:
        trace: what the workers recorded.
        planned: what was predicted; None: that is not known.
        as_picture: SVG instead of text.
    """
    if planned is None:
        return _alone(trace, _anonymous(trace), "its plan was not kept", as_picture=as_picture)
    plan, problem = planned.plan, planned.problem
    names = [stage.device_names for stage in plan.stages]
    try:
        candidate = replayed(plan, problem.table, problem.shape, problem.devices, problem.links)
        found = compare(candidate.groups, plan.num_micro_batches, trace)
    except PlanError as error:
        return _alone(trace, names, str(error), as_picture=as_picture)
    return compared_svg(found, names) if as_picture else compared_text(found, names)


def write_step(drawn: str, path: Path) -> None:
    """Write a picture.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        path.write_text(drawn, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}; choose another file for --gantt") from error


def _alone(trace: StepTrace, names: list[tuple[str, ...]], why: str, *, as_picture: bool) -> str:
    measured = trace.on_one_clock()
    title = f"step {trace.step} as it was: {measured.step_s:.4g} s; without its prediction: {why}"
    return gantt_svg(measured, names, title=title) if as_picture else f"{title}\n\n{gantt_text(measured, names)}"


def _anonymous(trace: StepTrace) -> list[tuple[str, ...]]:
    stages = max(worker.stage for worker in trace.workers) + 1
    return [tuple("device" for worker in trace.workers if worker.stage == k) for k in range(stages)]
