"""A step of a run beside its prediction: which devices, and which messages, took how much longer.

Entry points: :func:`compare`, :func:`compared_text`, :func:`compared_svg`. Between the two stands the run played again:
its measured passes over the predicted links. What the prediction lacks against that was computing; what that lacks
against the run was messages, and whatever the simulator leaves out: the vote, the update, other work on the machine.
"""

from __future__ import annotations

from collections.abc import Sequence

from partitioner.gantt import Names, gantt_text, gantts_svg
from partitioner.replay import StageGroup
from partitioner.simulate import simulate_step
from partitioner.trace import StepTrace, Trace, WorkerName
from partitioner.values import PlanValue
from plutino.errors import PlanError


class WorkerSeconds(PlanValue):
    """One worker's computing in a step."""

    stage: int
    replica: int
    predicted_s: float
    measured_s: float

    @property
    def ratio(self) -> float:
        """Measured over predicted."""
        return self.measured_s / self.predicted_s if self.predicted_s > 0 else 1.0


class Comparison(PlanValue):
    """A step as predicted, as it was, and its passes over the predicted links."""

    step: int
    predicted: Trace
    replayed: Trace
    measured: Trace
    workers: tuple[WorkerSeconds, ...]

    @property
    def computing_s(self) -> float:
        """What of the step's difference is computing."""
        return self.replayed.step_s - self.predicted.step_s

    @property
    def other_s(self) -> float:
        """The rest: messages, the vote, the update."""
        return self.measured.step_s - self.replayed.step_s


def compare(groups: Sequence[StageGroup], num_micro_batches: int, run: StepTrace) -> Comparison:
    """Set a recorded step beside the prediction of the plan that it ran under.

    Args:
        groups: the plan's stages with their predicted seconds (:func:`partitioner.report.replayed`).
        num_micro_batches: of a step.
        run: what the workers recorded.

    Raises:
        PlanError: the step was not one of this plan.
    """
    measured = run.on_one_clock()
    predicted = simulate_step(groups, num_micro_batches)
    passes, wanted = measured.durations(), predicted.durations()
    if passes.keys() != wanted.keys():
        raise PlanError(
            f"step {run.step} has {len(passes)} recorded passes, the plan {len(wanted)}: "
            f"{_example(passes.keys() ^ wanted.keys())} is in one of them only; take a step of plan epoch "
            f"{run.plan_epoch}'s own plan"
        )
    busy_s, predicted_s = measured.busy_s(), predicted.busy_s()
    return Comparison(
        step=run.step,
        predicted=predicted,
        replayed=simulate_step(groups, num_micro_batches, measured=passes),
        measured=measured,
        workers=tuple(
            WorkerSeconds(stage=name[0], replica=name[1], predicted_s=predicted_s[name], measured_s=busy_s[name])
            for name in sorted(predicted_s)
        ),
    )


def _example(keys: set[tuple[WorkerName, bool, int]]) -> str:
    (stage, replica), is_forward, m = min(keys)
    return f"the {'forward' if is_forward else 'backward'} pass of micro-batch {m} on stage {stage}, replica {replica}"


def compared_text(found: Comparison, names: Names, *, width: int = 100) -> str:
    """Seconds worker by worker, then all three as text on one scale."""
    until_s = max(found.predicted.step_s, found.replayed.step_s, found.measured.step_s)
    lines = [
        f"step {found.step}: {found.measured.step_s:.4g} s, predicted {found.predicted.step_s:.4g} s; computing made "
        f"{found.computing_s:+.3g} s of it, messages and the rest {found.other_s:+.3g} s"
    ]
    for worker in found.workers:
        lines.append(
            f"  stage {worker.stage} on {names[worker.stage][worker.replica]}: computed {worker.measured_s:.4g} s, "
            f"predicted {worker.predicted_s:.4g} s ({worker.ratio:.2f} x)"
        )
    for title, trace in _panels(found):
        lines += ["", title, gantt_text(trace, names, width=width, until_s=until_s).rstrip("\n")]
    return "\n".join(lines) + "\n"


def compared_svg(found: Comparison, names: Names) -> str:
    """All three as a picture."""
    return gantts_svg(_panels(found), names)


def _panels(found: Comparison) -> list[tuple[str, Trace]]:
    return [
        (f"predicted: {found.predicted.step_s:.4g} s", found.predicted),
        (f"its measured passes over the predicted links: {found.replayed.step_s:.4g} s", found.replayed),
        (f"step {found.step} as it was: {found.measured.step_s:.4g} s", found.measured),
    ]
