"""Is a step as long, and a worker as large, as the plan says? ``python -m benchmarks.predicted``.

Ten different jobs on agents that are processes with processors of their own (:mod:`benchmarks.agent_runs`): one thread
and several, quotas of processor time, budgets that leave no choice of cuts, pipelines and whatever the planner likes,
recomputation, short rows, few micro-batches. Wanted: the step within 15 % and the machine's A/A noise, job bytes within
10 % and never below what is measured. Figures are written after every run. ``--lanes`` runs several beside each other.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.agent_runs import LEAST_STEPS, TINY, measure_all
from benchmarks.beside import run_beside
from benchmarks.cores import physical_first
from benchmarks.goals import goal_table
from benchmarks.measure import RESULTS_DIR, machine_facts, write_results
from benchmarks.peers.workload import Workload
from benchmarks.processor_quota import quota_refusal
from benchmarks.run_figures import Figures, Run, prediction_goals, scaling_table

FULL = Workload(
    num_blocks=24,
    hidden_dim=768,
    intermediate_dim=2048,
    num_heads=12,
    vocab_size=4096,
    seq_len_tokens=64,
    batch_size=12,
    num_micro_batches=12,
)
"""Large beside its computing, so that half of it is enough to say something about bytes."""


def runs_of(workload: Workload) -> list[Run]:
    """All runs; those with most to do first."""
    one, two = (1,), (1, 1)
    few = replace(workload, num_micro_batches=workload.num_micro_batches // 4)
    short = replace(workload, seq_len_tokens=workload.seq_len_tokens // 2)
    return [
        Run(name="one agent", threads=one, workload=workload),
        Run(name="quota", threads=two, workload=workload, quotas=(1.0, 0.5), num_stages=2),
        Run(name="checkpointing", threads=two, workload=workload, checkpointing="on", num_stages=2),
        Run(name="tight budgets", threads=two, workload=workload, job_share=0.62),
        Run(name="two stages", threads=two, workload=workload, num_stages=2),
        Run(name="few micro-batches", threads=two, workload=few, num_stages=2),
        Run(name="two threads", threads=(2,), workload=workload),
        Run(name="unequal stages", threads=(2, 1), workload=workload, num_stages=2),
        Run(name="three agents", threads=(2, 1, 1), workload=workload),
        Run(name="short rows", threads=two, workload=short),
    ]


def main(arguments: list[str] | None = None) -> int:
    """Command line; gives the process's exit status."""
    options = _parser().parse_args(arguments)
    if options.steps < LEAST_STEPS:
        raise SystemExit(f"--steps must be at least {LEAST_STEPS}: one warms up, and even and odd ones are compared")
    out = options.out or RESULTS_DIR / ("predicted_quick.json" if options.quick else "predicted.json")
    cores = physical_first(sorted(os.sched_getaffinity(0)))
    if options.lanes > 1:
        return _in_lanes(options, cores, out)
    runs = runs_of(TINY if options.quick else FULL)
    if options.only:
        runs = [run for run in runs if run.name in options.only]
    refusal = quota_refusal()
    left_out = {run.name: refusal for run in runs if run.quotas and refusal is not None}
    found: dict[str, Figures] = {}
    machine = machine_facts(("torch", "transformers", "peft", "grpcio"))

    def note(figures: Figures) -> None:
        found[figures.run.name] = figures
        _write(out, machine, found, left_out)

    runs = [run for run in runs if run.name not in left_out]
    failed = left_out | measure_all(runs, cores, num_steps=options.steps, minutes=options.minutes, on_figures=note)
    _write(out, machine, found, failed)
    print(scaling_table(list(found.values())))
    goals = [goal for figures in found.values() for goal in prediction_goals(figures)]
    if goals:
        print(goal_table(goals))
    print(f"all figures: {out}")
    return 1 if failed else 0


def _write(out: Path, machine: Mapping[str, object], found: Mapping[str, Figures], failed: Mapping[str, str]) -> None:
    errors = [abs(figures.error) for figures in found.values() if not figures.shares_cores]
    document = {
        "machine": machine,
        "runs": {name: figures.values for name, figures in found.items()},
        "failed": dict(failed),
        "median_error": statistics.median(errors) if errors else None,
        "largest_error": max(errors, default=None),
        "goals": [goal.to_dict() for figures in found.values() for goal in prediction_goals(figures)],
    }
    write_results(out, document)


def _in_lanes(options: argparse.Namespace, cores: Sequence[int], out: Path) -> int:
    names = [run.name for run in runs_of(TINY)]
    lanes = {f"lane{lane}": names[lane :: options.lanes] for lane in range(options.lanes)}
    paths = {lane: out.with_name(f"{out.stem}_{lane}.json") for lane in lanes}
    commands = {
        lane: [
            *("benchmarks.predicted", "--only", *only, "--steps", str(options.steps)),
            *("--minutes", str(options.minutes), "--out", str(paths[lane])),
            *(["--quick"] if options.quick else []),
        ]
        for lane, only in lanes.items()
    }
    size = len(cores) // options.lanes
    shares = {lane: cores[number * size : (number + 1) * size] for number, lane in enumerate(lanes)}
    status = run_beside(commands, shares, minutes=options.minutes)
    documents = {lane: json.loads(path.read_text()) if path.is_file() else None for lane, path in paths.items()}
    write_results(out, {"lanes": documents})
    print(f"all figures: {out}")
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.predicted", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="RUN", help="these runs, by name")
    parser.add_argument("--steps", type=int, default=7, help="steps of each run, the first of which is left out")
    parser.add_argument("--minutes", type=float, default=60.0, help="nothing is begun or waited for after these")
    parser.add_argument("--lanes", type=int, default=1, help="so many runs beside each other, on processors apart")
    parser.add_argument("--quick", action="store_true", help="a tiny model: see it run, quote nothing")
    parser.add_argument("--out", type=Path, default=None, help="where the figures go; by default benchmarks/results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
