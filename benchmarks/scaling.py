"""Do more devices train faster, and does the plan know by how much? ``python -m benchmarks.scaling``.

Agents are processes with processors of their own; jobs are planned, trained and watched as anybody's. Three questions:

- equal agents, 1, 2, 4 and 8: tokens/s beside those of one;
- agents of 4, 2 and 1 threads: together beside the sum of each alone;
- all these and more: the predicted seconds of a step beside the measured, and the bytes of each worker.

``--cuda`` asks another: two cards beside torch.distributed.pipelining over NCCL (:mod:`benchmarks.scaling_cuda`).
Whatever plan comes is taken: a pipeline, replicas, or fewer devices than there are.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from benchmarks.contender import START_TIMEOUT_S, STEP_TIMEOUT_S, ContenderError
from benchmarks.goals import Goal, goal_table
from benchmarks.job_watch import JobWatch
from benchmarks.measure import RESULTS_DIR, machine_facts, write_results
from benchmarks.model_folder import DtypeName, job_values, write_drawn_base
from benchmarks.peers.workload import Workload
from benchmarks.stack import PlutinoStack
from partitioner.explain import explain
from partitioner.plan import Plan
from plutino.events import PlanMade, StepCommitted
from plutino.job.spec import parse_spec
from plutino.sizes import GIB, MIB

MOST_ERROR = 0.15
"""Of a predicted step, beside the machine's own A/A noise."""
LEAST_EQUAL = 0.92
LEAST_UNEQUAL = 0.85
LEAST_JOB_BYTES = 300 * MIB
"""Below it a worker's own unevenness weighs too much to say anything about a prediction."""
NO_SHADOWS = 1_000_000
_NUM_SPARE_STEPS = 4
"""Steps beyond those that are looked at: the job is cancelled before it would export what nobody wants."""
_LEAST_STEPS = 4

FULL = Workload(
    num_blocks=24,
    hidden_dim=512,
    intermediate_dim=1408,
    num_heads=8,
    vocab_size=2048,
    seq_len_tokens=128,
    batch_size=64,
    num_micro_batches=64,
)
"""Many blocks and micro-batches: what is lost to whole blocks and to the bubble is not what this benchmark is about."""
TINY = Workload(
    num_blocks=4,
    hidden_dim=64,
    intermediate_dim=128,
    num_heads=4,
    vocab_size=512,
    seq_len_tokens=32,
    batch_size=8,
    num_micro_batches=8,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One job on agents of so many threads each."""

    name: str
    threads: tuple[int, ...]
    workload: Workload
    dtype: DtypeName = "fp32"
    checkpointing: Literal["on", "off"] = "off"
    budget_bytes: int = 3 * GIB


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

    @property
    def median_step_s(self) -> float:
        """Measured."""
        return statistics.median(self.step_s)

    @property
    def a_a_noise(self) -> float:
        """How far even and odd steps are apart."""
        return abs(statistics.median(self.step_s[0::2]) / statistics.median(self.step_s[1::2]) - 1)

    @property
    def error(self) -> float:
        """How far the measured step is from the predicted one, as a share of the predicted."""
        return self.median_step_s / self.predicted_step_s - 1

    @property
    def tokens_per_s(self) -> float:
        """Tokens trained."""
        return self.run.workload.tokens_per_step / self.median_step_s


def runs_of(part: str, workload: Workload, *, most_agents: int) -> list[Run]:
    """The runs of a part."""
    if part == "equal":
        counts = [count for count in (1, 2, 4, 8) if count <= most_agents]
        return [Run(name=f"equal {count}", threads=(1,) * count, workload=workload) for count in counts]
    if part == "unequal":
        fast = (4, 2, 1) if most_agents > 2 else (2, 1)
        alone = [Run(name=f"alone {threads}", threads=(threads,), workload=workload) for threads in fast]
        return [*alone, Run(name=f"unequal {':'.join(map(str, fast))}", threads=fast, workload=workload)]
    two = (1, 1)
    half_tokens = replace(workload, seq_len_tokens=workload.seq_len_tokens // 2)
    few = replace(workload, batch_size=workload.batch_size // 2, num_micro_batches=workload.num_micro_batches // 4)
    return [
        Run(name="short rows", threads=two, workload=half_tokens),
        Run(name="few micro-batches", threads=two, workload=few),
        Run(name="checkpointing", threads=two, workload=workload, checkpointing="on"),
        Run(name="bf16", threads=two, workload=workload, dtype="bf16"),
    ]


def cores_for(run: Run, available: Sequence[int]) -> tuple[dict[str, set[int]], bool]:
    """Processors of each agent, and whether there are too few for all to have their own."""
    found: dict[str, set[int]] = {}
    at = 0
    for index, threads in enumerate(run.threads):
        found[agent_name(run, index)] = {available[(at + i) % len(available)] for i in range(threads)}
        at += threads
    return found, at > len(available)


def agent_name(run: Run, index: int) -> str:
    """An agent's name; each run has its own agents."""
    return f"{run.name.replace(' ', '-').replace(':', '-')}-{index}"


def measure(run: Run, stack: PlutinoStack, scratch: Path, cores: Sequence[int], *, num_steps: int) -> Figures:
    """Start the run's agents, train, end them.

    Raises:
        ContenderError: the job failed or stopped telling.
        PlutinoError: a process does not start, or the job does not fit.
    """
    pins, shares_cores = cores_for(run, cores)
    threads = {agent_name(run, index): count for index, count in enumerate(run.threads)}
    stack.start_agents(dict.fromkeys(threads, run.budget_bytes), threads=threads, cores=pins)
    try:
        folder = scratch / run.name.replace(" ", "-")
        written = write_drawn_base(run.workload, folder, num_steps=num_steps + _NUM_SPARE_STEPS)
        values = job_values(
            run.workload,
            written,
            dtype=run.dtype,
            checkpointing=run.checkpointing,
            shadow_every=NO_SHADOWS,
            num_stages=1,
        )
        values["placement"] = {"devices": list(threads)}
        job_id = stack.client.submit(parse_spec(values, base_dir=folder))
        watch = JobWatch(stack.client, job_id)
        plan, steps = collect(watch, num_steps)
        stack.client.cancel(job_id)
        watch.join()
    except ContenderError as error:
        raise ContenderError(f"{run.name}: {error}\n{stack.logs()}") from error
    finally:
        stack.stop_agents()
    return figures_of(run, plan, steps, shares_cores=shares_cores)


def collect(watch: JobWatch, num_steps: int) -> tuple[Plan, list[StepCommitted]]:
    """The plan and so many steps, the first of which warms up.

    Raises:
        ContenderError: the job failed, or ended before.
    """
    plan: Plan | None = None
    steps: list[StepCommitted] = []
    while len(steps) < num_steps:
        event = watch.next(STEP_TIMEOUT_S if steps else START_TIMEOUT_S)
        if event is None:
            raise ContenderError(f"the job ended after {len(steps)} of {num_steps} steps")
        if isinstance(event, PlanMade):
            plan = Plan.model_validate_json(event.plan_json)
            print(explain(plan), file=sys.stderr, flush=True)
        elif isinstance(event, StepCommitted):
            steps.append(event)
            print(f"step {event.step}: {event.seconds:.3f} s, loss {event.loss:.4f}", file=sys.stderr, flush=True)
    if plan is None:
        raise ContenderError("the job trained without telling its plan")
    return plan, steps


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
        predicted_compute_s=tuple(count * (r.forward_s + r.backward_s) for r, count in planned.values()),
    )


def goals_of(found: Mapping[str, Figures]) -> list[Goal]:
    """The goals that these runs say something about; runs that shared processors say nothing about speed."""
    goals = []
    alone = {name: figures for name, figures in found.items() if not figures.shares_cores}
    if "equal 2" in alone and "equal 8" in alone:
        efficiency = alone["equal 8"].tokens_per_s / (4 * alone["equal 2"].tokens_per_s)
        goals.append(Goal(name="8 equal agents beside 4 x those of 2", measured=efficiency, at_least=LEAST_EQUAL))
    for name, figures in alone.items():
        parts = [alone.get(f"alone {threads}") for threads in figures.run.threads]
        if name.startswith("unequal") and all(parts):
            together = figures.tokens_per_s / sum(part.tokens_per_s for part in parts if part)
            goals.append(Goal(name=f"{name} beside the sum", measured=together, at_least=LEAST_UNEQUAL))
        most = MOST_ERROR + figures.a_a_noise
        goals.append(Goal(name=f"{name}: step beside the predicted", measured=abs(figures.error), at_most=most))
    for name, figures in found.items():
        for worker in figures.workers:
            ratio = worker.measured_bytes / worker.predicted_bytes
            is_judged = worker.predicted_bytes >= LEAST_JOB_BYTES and not worker.keeps_heap
            least = 0.9 if is_judged else None
            goals.append(
                Goal(name=f"{name}, {worker.device}: bytes / predicted", measured=ratio, at_least=least, at_most=1.0)
            )
    return goals


def scaling_table(found: Sequence[Figures]) -> str:
    """Plain text: a line a run."""
    lines = [f"{'run':<20} {'workers':>7} {'s/step':>8} {'predicted':>9} {'error':>7} {'A/A':>5} {'tokens/s':>9}"]
    for each in found:
        note = "  (agents share processors)" if each.shares_cores else ""
        lines.append(
            f"{each.run.name:<20} {each.num_workers:>7} {each.median_step_s:>8.3f} {each.predicted_step_s:>9.3f} "
            f"{each.error:>+7.1%} {each.a_a_noise:>5.1%} {each.tokens_per_s:>9.0f}{note}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Command line; gives the process's exit status."""
    options = _parser().parse_args(arguments)
    if options.steps < _LEAST_STEPS:
        raise SystemExit(f"--steps must be at least {_LEAST_STEPS}: one warms up, and even and odd ones are compared")
    if options.cuda:
        from benchmarks.scaling_cuda import run_cuda

        return run_cuda(options.out or RESULTS_DIR / "scaling_cuda.json", quick=options.quick, num_steps=options.steps)
    workload = TINY if options.quick else FULL
    if options.rows is not None:
        workload = replace(workload, batch_size=options.rows, num_micro_batches=options.rows)
    out = options.out or RESULTS_DIR / ("scaling_quick.json" if options.quick else "scaling.json")
    machine = machine_facts(("torch", "transformers", "peft", "grpcio"))
    cores = sorted(os.sched_getaffinity(0))
    # Two for the coordinator and this program, where the largest run leaves them.
    own = cores[-2:] if len(cores) >= 10 else cores
    found: dict[str, Figures] = {}
    with tempfile.TemporaryDirectory(prefix="plutino-scaling-") as scratch_name:
        scratch = Path(scratch_name)
        state_dir = scratch / "state"
        state_dir.mkdir()
        os.sched_setaffinity(0, own)
        with PlutinoStack(state_dir) as stack:
            for part in options.parts:
                for run in runs_of(part, workload, most_agents=options.agents):
                    left = [core for core in cores if core not in own] or cores
                    found[run.name] = measure(run, stack, scratch, left, num_steps=options.steps)
                    print(scaling_table([found[run.name]]), flush=True)
    print(scaling_table(list(found.values())))
    goals = goals_of(found)
    print(goal_table(goals))
    document = {
        "machine": machine,
        "workload": asdict(workload),
        "runs": {
            name: {
                **asdict(figures),
                "median_step_s": figures.median_step_s,
                "error": figures.error,
                "a_a_noise": figures.a_a_noise,
                "tokens_per_s": figures.tokens_per_s,
            }
            for name, figures in found.items()
        },
        "goals": [goal.to_dict() for goal in goals],
    }
    write_results(out, document)
    print(f"all figures: {out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parts = ("equal", "unequal", "variety")
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts), help="only these")
    parser.add_argument("--agents", type=int, default=8, help="most agents of a run")
    parser.add_argument("--steps", type=int, default=7, help="steps of each run, the first of which is left out")
    parser.add_argument("--rows", type=int, help="rows of a step, one a micro-batch; by default 64")
    parser.add_argument("--cuda", action="store_true", help="instead: two cards beside torch pipelining over NCCL")
    parser.add_argument("--quick", action="store_true", help="a tiny model: see it run, quote nothing")
    parser.add_argument("--out", type=Path, default=None, help="where the figures go; by default benchmarks/results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
