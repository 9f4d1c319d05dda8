"""Does a stage take the memory that its plan says? ``python -m benchmarks.memory``.

Real worker processes train jobs under budgets that leave them little more than the prediction. Compared is the peak of
a worker's resident memory beyond its measured baseline with the job bytes of the plan. Also measured: what a
supervisor holds, and how long ``plutino --help`` takes.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from benchmarks.contender import START_TIMEOUT_S, STEP_TIMEOUT_S, ContenderError
from benchmarks.goals import Goal, goal_table
from benchmarks.job_watch import JobWatch
from benchmarks.measure import RESULTS_DIR, machine_facts, write_results
from benchmarks.model_folder import DtypeName, job_values, write_base
from benchmarks.peers.workload import Workload
from benchmarks.stack import PlutinoStack
from partitioner.memory import HEAP_REUSE
from partitioner.plan import Plan, StagePlan
from plutino.events import JobStateChanged, PlanMade, StepCommitted, Usage
from plutino.job.spec import JobSpec, parse_spec
from plutino.sizes import GIB, MIB

LEAST_RATIO, MOST_RATIO = 0.9, 1.0
LEAST_RATIO_OF_A_START = 0.85
"""Where the peak is a pass before the first step, whose bill keeps room for what is only trained later."""
MOST_SUPERVISOR_MIB = 80.0
MOST_HELP_S = 0.3
LEAST_JOB_BYTES = 300 * MIB
"""Below it a worker's own unevenness weighs too much to say anything about a prediction."""
BUDGET_SLACK = 1.03
PROBE_BUDGET_BYTES = 6 * GIB
NUM_STAGES = 2
SHADOW_EVERY = 3
"""Snapshots are part of the bill, so they must be taken while the peak is watched."""
_NUM_HELPS = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryCase:
    """One job whose memory is looked at."""

    name: str
    workload: Workload
    dtype: DtypeName
    checkpointing: Literal["on", "off"] = "off"
    method: Mapping[str, str | int] = field(default_factory=dict)
    """In place of the workload's LoRA."""
    least_ratio: float = LEAST_RATIO


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMemory:
    """What one stage was predicted to take, and took."""

    stage_index: int
    device_name: str
    start_block: int
    end_block: int
    baseline_bytes: int
    predicted_job_bytes: int
    peak_rss_bytes: int
    budget_bytes: int
    keeps_heap: bool
    items_bytes: dict[str, int]
    """The predicted bill."""

    @property
    def measured_job_bytes(self) -> int:
        """Peak resident memory beyond the baseline."""
        return self.peak_rss_bytes - self.baseline_bytes

    @property
    def ratio(self) -> float:
        """Measured over predicted."""
        return self.measured_job_bytes / self.predicted_job_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseMemory:
    """What a case showed."""

    case: MemoryCase
    stages: tuple[StageMemory, ...]
    supervisors_rss_bytes: dict[str, int]
    """Largest resident memory that each agent told."""


def cases() -> list[MemoryCase]:
    """Two stages of at least 300 MiB each: fp32, fp32 with recomputation, bf16, a side network pruned by gradients."""

    def llama(num_blocks: int) -> Workload:
        return Workload(
            num_blocks=num_blocks,
            hidden_dim=1024,
            intermediate_dim=2816,
            num_heads=16,
            vocab_size=8192,
            batch_size=4,
            num_micro_batches=2,
        )

    return [
        MemoryCase(name="fp32", workload=llama(8), dtype="fp32"),
        MemoryCase(name="fp32 checkpointing", workload=llama(10), dtype="fp32", checkpointing="on"),
        MemoryCase(name="bf16", workload=llama(8), dtype="bf16"),
        MemoryCase(
            name="pruned by gradients",
            workload=llama(8),
            dtype="fp32",
            method={"type": "parallel_adapters", "reduction": 8, "init": "fisher"},
            least_ratio=LEAST_RATIO_OF_A_START,
        ),
    ]


def quick_case() -> MemoryCase:
    """A tiny job, to see the benchmark run."""
    workload = Workload(
        num_blocks=4,
        hidden_dim=256,
        intermediate_dim=512,
        num_heads=4,
        vocab_size=1024,
        seq_len_tokens=64,
        batch_size=4,
        num_micro_batches=2,
    )
    return MemoryCase(name="quick", workload=workload, dtype="fp32")


def main(arguments: list[str] | None = None) -> int:
    """Command line; gives the process's exit status."""
    options = _parser().parse_args(arguments)
    chosen = [quick_case()] if options.quick else cases()
    if options.case:
        chosen = [case for case in chosen if case.name in options.case]
    out = options.out or RESULTS_DIR / ("memory_quick.json" if options.quick else "memory.json")
    machine = machine_facts(("torch", "transformers", "peft", "grpcio"))
    help_s = measure_help_s()
    measured = []
    for case in chosen:
        with tempfile.TemporaryDirectory(prefix="plutino-benchmark-") as scratch:
            measured.append(_measure(case, Path(scratch), num_steps=options.steps))
        print(memory_table(measured[-1:]), flush=True)
    goals = memory_goals(measured, help_s=help_s)
    print(goal_table(goals))
    document = memory_document(measured, help_s=help_s)
    write_results(out, {"machine": machine, **document, "goals": [goal.to_dict() for goal in goals]})
    print(f"all figures: {out}")
    return 0


def measure_help_s() -> float:
    """Median seconds of ``plutino --help``, the interpreter's start included."""
    seconds = []
    for _ in range(_NUM_HELPS):
        started_s = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "coordinator.cli", "--help"], check=True, stdout=subprocess.DEVNULL, timeout=60
        )
        seconds.append(time.perf_counter() - started_s)
    return statistics.median(seconds)


def tight_budgets_bytes(plan: Plan) -> list[int]:
    """Budget of each stage's device: the prediction without what malloc may keep where there is room, and a little."""
    budgets = []
    for stage in plan.stages:
        needed_bytes = stage.job_bytes - sum(item.bytes for item in stage.memory if item.name == HEAP_REUSE)
        budgets.append(stage.baseline_bytes + int(BUDGET_SLACK * needed_bytes))
    return budgets


def memory_goals(measured: Sequence[CaseMemory], *, help_s: float) -> list[Goal]:
    """Every stage within a tenth below its prediction and never above; a small supervisor; a quick command."""
    goals = [
        Goal(
            name=f"{case.case.name}, stage {stage.stage_index}: measured / predicted",
            measured=stage.ratio,
            at_least=case.case.least_ratio,
            at_most=MOST_RATIO,
        )
        for case in measured
        for stage in case.stages
    ]
    supervisor_bytes = max(rss for case in measured for rss in case.supervisors_rss_bytes.values())
    goals.append(
        Goal(name="supervisor", measured=supervisor_bytes / MIB, unit="MiB", at_most=MOST_SUPERVISOR_MIB),
    )
    return [*goals, Goal(name="plutino --help", measured=help_s, unit="s", at_most=MOST_HELP_S)]


def memory_document(measured: Sequence[CaseMemory], *, help_s: float) -> dict[str, object]:
    """All figures as values for JSON."""
    return {
        "cases": [
            {
                "name": case.case.name,
                "dtype": case.case.dtype,
                "checkpointing": case.case.checkpointing,
                "workload": asdict(case.case.workload),
                "stages": [
                    {**asdict(stage), "measured_job_bytes": stage.measured_job_bytes, "ratio": stage.ratio}
                    for stage in case.stages
                ],
                "supervisors_rss_bytes": case.supervisors_rss_bytes,
            }
            for case in measured
        ],
        "help_s": help_s,
    }


def memory_table(measured: Sequence[CaseMemory]) -> str:
    """Plain text: a line a stage."""
    lines = [f"{'case':<20} {'stage':>5} {'blocks':>8} {'baseline':>9} {'predicted':>10} {'measured':>9} {'ratio':>6}"]
    for case in measured:
        for stage in case.stages:
            blocks = f"[{stage.start_block}, {stage.end_block})"
            note = "" if stage.predicted_job_bytes >= LEAST_JOB_BYTES else "  (too small to judge by)"
            lines.append(
                f"{case.case.name:<20} {stage.stage_index:>5} {blocks:>8} {stage.baseline_bytes / MIB:>5.0f} MiB "
                f"{stage.predicted_job_bytes / MIB:>6.0f} MiB {stage.measured_job_bytes / MIB:>5.0f} MiB "
                f"{stage.ratio:>6.2f}{note}"
            )
    return "\n".join(lines)


def _measure(case: MemoryCase, scratch: Path, *, num_steps: int) -> CaseMemory:
    folder = write_base(case.workload, scratch, num_steps=num_steps, dtype=case.dtype)
    values = job_values(
        case.workload,
        folder,
        dtype=case.dtype,
        checkpointing=case.checkpointing,
        shadow_every=SHADOW_EVERY,
        num_stages=NUM_STAGES,
    )
    values["method"] = dict(case.method) or values["method"]
    state_dir = scratch / "state"
    state_dir.mkdir()
    with PlutinoStack(state_dir) as stack:
        stack.start_agents({f"probe-{index}": PROBE_BUDGET_BYTES for index in range(NUM_STAGES)})
        roomy = stack.plan(parse_spec(values, base_dir=scratch))
        stack.stop_agents()
        budgets = {f"tight-{index}": budget for index, budget in enumerate(tight_budgets_bytes(roomy))}
        stack.start_agents(budgets)
        values["placement"]["devices"] = list(budgets)
        return _run(case, stack, parse_spec(values, base_dir=scratch))


def _run(case: MemoryCase, stack: PlutinoStack, spec: JobSpec) -> CaseMemory:
    watch = JobWatch(stack.client, stack.client.submit(spec))
    plan: Plan | None = None
    num_steps = 0
    is_seen_since = False
    peaks_bytes: dict[int, int] = {}
    supervisors_bytes: dict[str, int] = {}
    while (event := watch.next(STEP_TIMEOUT_S if num_steps else START_TIMEOUT_S)) is not None:
        match event:
            case PlanMade():
                plan = Plan.model_validate_json(event.plan_json)
            case StepCommitted():
                num_steps += 1
                is_seen_since = False
            case Usage():
                is_seen_since = True
                for worker in event.workers:
                    stage = worker.worker.stage_index
                    peaks_bytes[stage] = max(peaks_bytes.get(stage, 0), worker.peak_rss_bytes)
                for name, rss_bytes in stack.agents_rss_bytes().items():
                    supervisors_bytes[name] = max(supervisors_bytes.get(name, 0), rss_bytes)
            case JobStateChanged(state="succeeded"):
                break
    watch.join()
    if plan is None or len(peaks_bytes) < len(plan.stages) or not is_seen_since:
        raise ContenderError(f"{case.name}: the job ended before its workers' memory was seen; give it more steps")
    kept = [stage.stage_index for stage in plan.stages if stage.keeps_heap]
    if kept:
        raise ContenderError(f"{case.name}: stages {kept} keep their heaps, their budgets are not tight: {plan.stages}")
    return CaseMemory(
        case=case,
        stages=tuple(_stage_memory(stage, peaks_bytes[stage.stage_index]) for stage in plan.stages),
        supervisors_rss_bytes=supervisors_bytes,
    )


def _stage_memory(stage: StagePlan, peak_rss_bytes: int) -> StageMemory:
    return StageMemory(
        stage_index=stage.stage_index,
        device_name=stage.device_names[0],
        start_block=stage.start_block,
        end_block=stage.end_block,
        baseline_bytes=stage.baseline_bytes,
        predicted_job_bytes=stage.job_bytes,
        peak_rss_bytes=peak_rss_bytes,
        budget_bytes=stage.budget_bytes,
        keeps_heap=stage.keeps_heap,
        items_bytes={item.name: item.bytes for item in stage.memory},
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--steps", type=int, default=8, help="steps of each job")
    parser.add_argument("--case", nargs="+", help="only these cases")
    parser.add_argument("--quick", action="store_true", help="a tiny job: see it run, quote nothing")
    parser.add_argument("--out", type=Path, default=None, help="where the figures go; by default benchmarks/results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
