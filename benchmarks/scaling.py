"""Do more devices train faster? ``python -m benchmarks.scaling``.

Agents are processes with processors of their own (:mod:`benchmarks.agent_runs`). Two questions:

- equal agents, 1, 2, 4 and 8: tokens/s beside those of one;
- agents of 4, 2 and 1 threads: together beside the sum of each alone.

Where there are fewer processors than agents, ``--quota 0.2`` gives each agent a fifth of one, times its speed, in
periods so short that it looks like a slower processor: fleets of slow devices, with all that messages cost them.

Beside each figure stands the bubble's share as planned: of M micro-batches a pipeline of S stages loses (S - 1) of
M + S - 1, so that 8 stages with 64 cannot give more than 0.915 of four times what 2 give, with 128 no more than 0.956.
All runs of a part are repeated in the other order (``--turns``), and how far a run's turns are apart is its A/A.

The predictions of all these runs are judged as well; benchmarks.predicted asks about nothing else. ``--at-once`` gives
each part processors of its own and runs them beside each other. ``--cuda`` asks another question: two cards beside
torch.distributed.pipelining over NCCL (:mod:`benchmarks.scaling_cuda`). Whatever plan comes is taken: a pipeline,
replicas, or fewer devices than there are. Figures are written after every run; a run that fails is named with the
reason, and the others go on.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.agent_runs import LEAST_STEPS, TINY, measure_all
from benchmarks.beside import run_beside
from benchmarks.cores import physical_first
from benchmarks.goals import Goal, goal_table
from benchmarks.measure import RESULTS_DIR, machine_facts, write_results
from benchmarks.peers.workload import Workload
from benchmarks.processor_quota import FINE_PERIOD_US
from benchmarks.run_figures import Figures, Run, prediction_goals, scaling_table

LEAST_EQUAL = 0.92
LEAST_UNEQUAL = 0.85
PARTS = ("equal", "unequal")
_UNEQUAL = (4, 2, 1)
_OWN_CORES = 2

UNEQUAL = Workload(
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

EQUAL = replace(UNEQUAL, seq_len_tokens=64, batch_size=128, num_micro_batches=128)
"""As many tokens, in twice as many micro-batches, because there are up to 8 stages."""

FULL = {"equal": EQUAL, "unequal": UNEQUAL}

_NARROW = {"hidden_dim": 384, "intermediate_dim": 1056, "num_heads": 6}
SLOW = {
    "equal": replace(EQUAL, **_NARROW),
    "unequal": replace(UNEQUAL, **_NARROW, seq_len_tokens=64),
}
"""For agents that have a share of a processor each."""
_ALONE_SHARE = 1.1
_TOGETHER_SHARE = 0.7
"""Of the job's bytes an agent has room for so much: for its stage, and for no spare worker beside it, whose imports
would take half of so small a quota for a minute."""


def runs_of(part: str, workload: Workload, *, most_agents: int, quota: float | None = None) -> list[Run]:
    """The runs of a part; those that take longest come last, because time may be up before.

    Args:
        part: one of :data:`PARTS`.
        workload: what is trained.
        most_agents: of a run.
        quota: processors of the slowest agent; None: threads are what agents differ in.
    """

    def run(name: str, speeds: tuple[int, ...]) -> Run:
        if quota is None:
            return Run(name=name, threads=speeds, workload=workload)
        quotas = tuple(quota * speed for speed in speeds)
        return Run(
            name=name,
            threads=(1,) * len(speeds),
            workload=workload,
            quotas=quotas,
            quota_period_us=FINE_PERIOD_US,
            job_share=_TOGETHER_SHARE if len(speeds) > 1 else _ALONE_SHARE,
        )

    if part == "equal":
        return [run(f"equal {count}", (1,) * count) for count in (8, 4, 2, 1) if count <= most_agents]
    fast = _UNEQUAL if most_agents > 2 else (2, 1)
    return [run(f"unequal {':'.join(map(str, fast))}", fast), *(run(f"alone {speed}", (speed,)) for speed in fast)]


def in_turns(runs: Sequence[Run], num_turns: int) -> list[Run]:
    """All runs, then all of them again in the other order, and so on: a drift of the machine hits all alike."""
    found: list[Run] = []
    for turn in range(num_turns):
        found += [replace(run, turn=turn) for run in (runs if turn % 2 == 0 else reversed(runs))]
    return found


def cores_needed(part: str, *, most_agents: int) -> int:
    """Processors that a part's largest run takes, with two for its coordinator."""
    return _OWN_CORES + (most_agents if part == "equal" else sum(_UNEQUAL))


def goals_of(found: Mapping[str, Figures]) -> list[Goal]:
    """The goals that these runs say something about; runs that shared processors say nothing about speed."""
    goals = []
    alone = {name: figures for name, figures in found.items() if not figures.shares_cores}
    if "equal 2" in alone and "equal 8" in alone:
        efficiency = alone["equal 8"].tokens_per_s / (4 * alone["equal 2"].tokens_per_s)
        goals.append(Goal(name="8 equal agents beside 4 x those of 2", measured=efficiency, at_least=LEAST_EQUAL))
    for name, figures in alone.items():
        parts = [alone.get(f"alone {speed}") for speed in name.removeprefix("unequal ").split(":")]
        if name.startswith("unequal") and all(parts):
            together = figures.tokens_per_s / sum(part.tokens_per_s for part in parts if part)
            goals.append(Goal(name=f"{name} beside the sum", measured=together, at_least=LEAST_UNEQUAL))
    for figures in found.values():
        goals += prediction_goals(figures)
    return goals


def main(arguments: list[str] | None = None) -> int:
    """Command line; gives the process's exit status."""
    options = _parser().parse_args(arguments)
    if options.steps < LEAST_STEPS:
        raise SystemExit(f"--steps must be at least {LEAST_STEPS}: one warms up, and even and odd ones are compared")
    if options.cuda:
        from benchmarks.scaling_cuda import run_cuda

        out = options.out or RESULTS_DIR / "scaling_cuda.json"
        return run_cuda(out, quick=options.quick, num_steps=options.steps, minutes=options.minutes)
    out = options.out or RESULTS_DIR / ("scaling_quick.json" if options.quick else "scaling.json")
    if options.at_once:
        if options.quota is not None:
            raise SystemExit("--at-once gives parts processors of their own; agents with a --quota share them")
        return _at_once(options, out)
    workloads = dict.fromkeys(PARTS, TINY) if options.quick else FULL if options.quota is None else SLOW
    if options.rows is not None:
        rows = {"batch_size": options.rows, "num_micro_batches": options.rows}
        workloads = {part: replace(workload, **rows) for part, workload in workloads.items()}
    machine = machine_facts(("torch", "transformers", "peft", "grpcio"))
    found: dict[str, Figures] = {}

    def note(figures: Figures) -> None:
        name = figures.run.name
        found[name] = found[name].with_turn(figures) if name in found else figures
        _write(out, machine, workloads, found, {})

    once = [
        run
        for part in options.parts
        for run in runs_of(part, workloads[part], most_agents=options.agents, quota=options.quota)
        if not options.only or run.name in options.only
    ]
    runs = in_turns(once, options.turns)
    cores = sorted(os.sched_getaffinity(0))
    failed = measure_all(runs, cores, num_steps=options.steps, minutes=options.minutes, on_figures=note)
    print(scaling_table(list(found.values())))
    if goals := goals_of(found):
        print(goal_table(goals))
    _write(out, machine, workloads, found, failed)
    print(f"all figures: {out}")
    return 1 if failed else 0


def _write(
    out: Path,
    machine: Mapping[str, object],
    workloads: Mapping[str, Workload],
    found: Mapping[str, Figures],
    failed: Mapping[str, str],
) -> None:
    document = {
        "machine": machine,
        "workloads": {part: asdict(workload) for part, workload in workloads.items()},
        "runs": {name: figures.values for name, figures in found.items()},
        "failed": dict(failed),
        "goals": [goal.to_dict() for goal in goals_of(found)],
    }
    write_results(out, document)


def shares_of_cores(cores: Sequence[int], parts: Sequence[str], *, most_agents: int) -> dict[str, list[int]]:
    """Processors for each part, physical cores for the agents as long as there are some.

    Raises:
        SystemExit: there are too few for all parts at once.
    """
    wanted = {part: cores_needed(part, most_agents=most_agents) for part in parts}
    if sum(wanted.values()) > len(cores):
        raise SystemExit(f"--at-once needs {sum(wanted.values())} processors, there are {len(cores)}; leave it out")
    ordered = physical_first(cores)
    found: dict[str, list[int]] = {}
    for part, count in wanted.items():
        found[part] = ordered[: count - _OWN_CORES]
        ordered = ordered[count - _OWN_CORES :]
    for part in parts:
        # What is left last: a coordinator computes little.
        found[part] += ordered[-_OWN_CORES:]
        ordered = ordered[:-_OWN_CORES]
    return found


def _at_once(options: argparse.Namespace, out: Path) -> int:
    shares = shares_of_cores(sorted(os.sched_getaffinity(0)), options.parts, most_agents=options.agents)
    commands = {
        part: [
            *("benchmarks.scaling", "--parts", part, "--agents", str(options.agents), "--steps", str(options.steps)),
            *("--minutes", str(options.minutes), "--out", str(_part_path(out, part))),
            *(["--quick"] if options.quick else []),
            *(["--rows", str(options.rows)] if options.rows is not None else []),
            *("--turns", str(options.turns)),
        ]
        for part in shares
    }
    status = run_beside(commands, shares, minutes=options.minutes)
    documents = {part: _read(_part_path(out, part)) for part in shares}
    write_results(out, {"at_once": documents})
    print(f"all figures: {out}")
    return status


def _part_path(out: Path, part: str) -> Path:
    return out.with_name(f"{out.stem}_{part}.json")


def _read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.is_file() else None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="only these")
    parser.add_argument("--at-once", action="store_true", help="parts beside each other, each on its own processors")
    parser.add_argument("--agents", type=int, default=8, help="most agents of a run")
    parser.add_argument("--steps", type=int, default=7, help="steps of each run, the first of which is left out")
    parser.add_argument("--minutes", type=float, default=60.0, help="nothing is begun or waited for after these")
    parser.add_argument("--quota", type=float, help="processors of the slowest agent, instead of cores of their own")
    parser.add_argument("--only", nargs="+", metavar="RUN", help="these runs, by name")
    parser.add_argument("--rows", type=int, help="rows of a step, one a micro-batch; by default 128 or 64")
    parser.add_argument("--turns", type=int, default=2, help="how often every run is begun")
    parser.add_argument("--cuda", action="store_true", help="instead: two cards beside torch pipelining over NCCL")
    parser.add_argument("--quick", action="store_true", help="a tiny model: see it run, quote nothing")
    parser.add_argument("--out", type=Path, default=None, help="where the figures go; by default benchmarks/results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
