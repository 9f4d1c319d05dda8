"""What is run on agents of their own, what was predicted of it, and what it showed."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

from benchmarks.goals import Goal
from benchmarks.model_folder import DtypeName
from benchmarks.peers.workload import Workload
from benchmarks.processor_quota import PERIOD_US
from partitioner.plan import Plan
from plutino.events import StepCommitted
from plutino.sizes import MIB

MOST_ERROR = 0.15
"""Of a predicted step, beside the machine's own A/A noise."""
LEAST_JOB_BYTES = 300 * MIB
"""Below it a worker's own unevenness weighs too much to say anything about a prediction."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One job on agents of so many threads each."""

    name: str
    threads: tuple[int, ...]
    workload: Workload
    dtype: DtypeName = "fp32"
    checkpointing: Literal["on", "off"] = "off"
    budgets_bytes: tuple[int, ...] = ()
    """Of each agent; empty: 3 GiB each."""
    quotas: tuple[float, ...] = ()
    """Processors that each agent may use at the most; empty: all that it is pinned to."""
    quota_period_us: int = PERIOD_US
    """In which an agent may use up its quota at once."""
    job_share: float | None = None
    """Instead of budgets: what a worker holds before any job, and this share of what the job would take alone."""
    num_stages: int | None = None
    """None: as many as the planner likes."""
    turn: int = 0
    """The same run again has another number, and agents of its own."""

    @property
    def label(self) -> str:
        """Unique among all turns of all runs, and good as a file's name."""
        of_turn = f"-again{self.turn}" if self.turn else ""
        return self.name.replace(" ", "-").replace(":", "-") + of_turn


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerBytes:
    """A worker's job bytes."""

    device: str
    predicted_bytes: int
    measured_bytes: int
    keeps_heap: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What a run showed."""

    run: Run
    plan: str
    num_stages: int
    num_workers: int
    shares_cores: bool
    """There were fewer processors than threads: nothing is to be concluded."""
    predicted_step_s: float
    step_s: tuple[float, ...]
    workers: tuple[WorkerBytes, ...]
    compute_s: tuple[float, ...]
    """Median seconds of computation of each worker in a step."""
    predicted_compute_s: tuple[float, ...]
    bubble_share: float = 0.0
    """Of the busiest stage's time, as the plan has it: what a pipeline of so many stages and micro-batches cannot give,
    whoever runs it."""
    later_turns: tuple[tuple[float, ...], ...] = ()
    """Steps of the same run, begun anew after others had their turn."""

    @property
    def values(self) -> dict[str, object]:
        """For JSON, with what follows from the figures."""
        return {
            **asdict(self),
            "median_step_s": self.median_step_s,
            "error": self.error,
            "a_a_noise": self.a_a_noise,
            "tokens_per_s": self.tokens_per_s,
        }

    @property
    def median_step_s(self) -> float:
        """Measured, over all turns."""
        return statistics.median([*self.step_s, *(s for turn in self.later_turns for s in turn)])

    @property
    def a_a_noise(self) -> float:
        """How far the same run's turns are apart, or even and odd steps of its only one."""
        if self.later_turns:
            medians = [statistics.median(turn) for turn in (self.step_s, *self.later_turns)]
            return max(medians) / min(medians) - 1
        return abs(statistics.median(self.step_s[0::2]) / statistics.median(self.step_s[1::2]) - 1)

    @property
    def error(self) -> float:
        """How far the measured step is from the predicted one, as a share of the predicted."""
        return self.median_step_s / self.predicted_step_s - 1

    @property
    def tokens_per_s(self) -> float:
        """Tokens trained."""
        return self.run.workload.tokens_per_step / self.median_step_s

    def with_turn(self, again: Figures) -> Figures:
        """With the steps of another turn of the same run; the plan and its workers are the first turn's."""
        return replace(self, later_turns=(*self.later_turns, again.step_s))


def figures_of(run: Run, plan: Plan, steps: Sequence[StepCommitted], *, shares_cores: bool) -> Figures:
    """A run's figures from its plan and its steps."""
    warm = steps[1:]
    planned = {
        (stage.stage_index, r): (replica, plan.micro_batch_owners[stage.stage_index].count(r))
        for stage in plan.stages
        for r, replica in enumerate(stage.replicas)
    }
    peaks: dict[tuple[int, int], int] = {}
    compute_s: dict[tuple[int, int], list[float]] = {}
    for step in warm:
        for times in step.workers:
            place = (times.worker.stage_index, times.worker.replica_index)
            peaks[place] = max(peaks.get(place, 0), times.peak_rss_bytes)
            compute_s.setdefault(place, []).append(times.compute_s)
    return Figures(
        run=run,
        plan=", ".join(
            f"{' + '.join(stage.device_names)} [{stage.start_block}, {stage.end_block})" for stage in plan.stages
        ),
        num_stages=len(plan.stages),
        num_workers=len(plan.agent_ids),
        shares_cores=shares_cores,
        predicted_step_s=plan.step_s,
        step_s=tuple(step.seconds for step in warm),
        workers=tuple(
            WorkerBytes(
                device=replica.device_name,
                predicted_bytes=replica.job_bytes,
                measured_bytes=peaks[place] - replica.baseline_bytes,
                keeps_heap=replica.keeps_heap,
            )
            for place, (replica, _) in planned.items()
        ),
        compute_s=tuple(statistics.median(compute_s[place]) for place in planned),
        bubble_share=plan.bubble_share,
        predicted_compute_s=tuple(count * (r.forward_s + r.backward_s) for r, count in planned.values()),
    )


def scaling_table(found: Sequence[Figures]) -> str:
    """Plain text: a line a run."""
    lines = [
        f"{'run':<20} {'workers':>7} {'s/step':>8} {'predicted':>9} {'error':>7} {'A/A':>5} {'tokens/s':>9} "
        f"{'bubble':>6}"
    ]
    for each in found:
        note = "  (agents share processors)" if each.shares_cores else ""
        lines.append(
            f"{each.run.name:<20} {each.num_workers:>7} {each.median_step_s:>8.3f} {each.predicted_step_s:>9.3f} "
            f"{each.error:>+7.1%} {each.a_a_noise:>5.1%} {each.tokens_per_s:>9.0f} "
            f"{each.bubble_share:>6.1%}{note}"
        )
    return "\n".join(lines)


def prediction_goals(figures: Figures) -> list[Goal]:
    """How near the prediction of one run was; of runs that shared processors only the bytes are judged."""
    name, goals = figures.run.name, []
    if not figures.shares_cores:
        most = MOST_ERROR + figures.a_a_noise
        goals.append(Goal(name=f"{name}: step beside the predicted", measured=abs(figures.error), at_most=most))
    for worker in figures.workers:
        ratio = worker.measured_bytes / worker.predicted_bytes
        is_judged = worker.predicted_bytes >= LEAST_JOB_BYTES and not worker.keeps_heap
        least = 0.9 if is_judged else None
        goals.append(
            Goal(name=f"{name}, {worker.device}: bytes / predicted", measured=ratio, at_least=least, at_most=1.0)
        )
    return goals
