"""LoRA on the top quarter of the blocks, with what lies below kept after the first epoch, against the same uncached.

    python -m benchmarks.frozen_prefix --out DIR [--workers N --threads T --agents 1,2,4 --shapes NAME,... --quick]

For every shape and number of agents one job a codec (``off`` is the uncached one): a coordinator and agents as
processes, each agent on cores and folders of its own, in a lane that no other job has; ``--workers`` bounds the cores
of all lanes. Weights and tokens are random, a quarter of each row carries loss. Seconds are wall clock from submit to
the job's end: plan, loading, writing and reading entries included. Written to ``DIR/frozen_prefix.json`` after every
job; what is there already is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.job_watch import JobWatch
from benchmarks.lanes import Case, answer_case, end_when_terminated, run_in_lanes
from benchmarks.model_folder import write_drawn_base
from benchmarks.peers.workload import Workload
from benchmarks.stack import PlutinoStack
from partitioner.plan import Plan
from plutino.events import JobEvent, PlanMade, StepCommitted
from plutino.job.spec import JobSpec

SHAPES = {
    "d768-12": Workload(num_blocks=12, hidden_dim=768, intermediate_dim=2048, num_heads=12, vocab_size=8000),
    "d1024-24": Workload(num_blocks=24, hidden_dim=1024, intermediate_dim=2752, num_heads=16, vocab_size=8000),
    "quick": Workload(
        num_blocks=4, hidden_dim=128, intermediate_dim=256, num_heads=8, vocab_size=500, seq_len_tokens=32
    ),
}
ROWS_PER_STEP, NUM_MICRO_BATCHES = 32, 8
_TIMEOUT_S = 1800.0


def job_of(workload: Workload, folder: Path, case: Case) -> JobSpec:
    """LoRA in the top quarter of the blocks."""
    model = write_drawn_base(workload, folder, num_steps=case["steps"])
    rows_path = folder / "quarter.jsonl"
    draw = random.Random(workload.seed)
    lines = []
    for _ in range(case["steps"] * workload.batch_size):
        num_tokens = draw.randint(workload.seq_len_tokens * 3 // 4, workload.seq_len_tokens - 2)
        words = [f"t{draw.randrange(1, workload.vocab_size)}" for _ in range(num_tokens)]
        cut = num_tokens * 3 // 4
        lines.append(json.dumps({"prompt": " ".join(words[:cut]), "completion": " " + " ".join(words[cut:])}))
    rows_path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return JobSpec.model_validate(
        {
            "name": "frozen prefix",
            "model": {"path": str(model.model_dir)},
            "method": {"type": "lora", "rank": 16, "blocks": f"last {workload.num_blocks // 4}"},
            "data": {"train": str(rows_path), "max_tokens": workload.seq_len_tokens},
            "training": {
                "epochs": case["epochs"],
                "batch_size": workload.batch_size,
                "micro_batch_size": workload.batch_size // workload.num_micro_batches,
                "lr": 1e-3,
                "activation_cache": case["codec"],
                "shadow_every": case["steps"],
            },
            "placement": {"threads": case["threads"], "replan": "never", "replicas": "never"},
            # Drawn weights lie in no file that an adapter could be verified against.
            "output": {"publish": False},
        }
    )


def run(case: Case, cores: Sequence[Sequence[int]]) -> dict[str, Any]:
    """One job; what was measured of it."""
    workload = replace(SHAPES[case["shape"]], batch_size=ROWS_PER_STEP, num_micro_batches=NUM_MICRO_BATCHES)
    agents, threads = [f"agent{index}" for index in range(case["agents"])], int(case["threads"])
    with tempfile.TemporaryDirectory(prefix="frozen-prefix-") as work:
        state_dir = Path(work) / "state"
        state_dir.mkdir()
        with PlutinoStack(state_dir) as stack:
            stack.start_agents(
                dict.fromkeys(agents, 8 << 30),
                threads=dict.fromkeys(agents, threads),
                cores=dict(zip(agents, cores, strict=False)) if cores else None,
                has_own_caches=True,
            )
            spec = job_of(workload, Path(work) / "job", case)
            started_s = time.monotonic()
            watch = JobWatch(stack.client, stack.client.submit(spec))
            seen: list[tuple[float, JobEvent]] = []
            while (event := watch.next(_TIMEOUT_S)) is not None:
                seen.append((time.monotonic() - started_s, event))
            watch.join()
            entry_bytes = sum(path.stat().st_size for path in (state_dir / "caches").rglob("*.data"))
    return {**case, "has_own_cores": bool(cores), "entry_bytes": entry_bytes, **_figures(seen, case["steps"])}


def _figures(seen: Sequence[tuple[float, JobEvent]], num_steps: int) -> dict[str, Any]:
    steps = [event for _, event in seen if isinstance(event, StepCommitted)]
    plan = next(Plan.model_validate_json(event.plan_json) for _, event in seen if isinstance(event, PlanMade))
    by_epoch = [steps[first : first + num_steps] for first in range(0, len(steps), num_steps)]
    return {
        "total_s": seen[-1][0],
        # The first step of an epoch also fills caches and the allocator.
        "step_s_by_epoch": [statistics.median(step.seconds for step in epoch[1:]) for epoch in by_epoch],
        "predicted_step_s": plan.step_s,
        "predicted_later_step_s": plan.later_step_s,
        "blocks": [(stage.start_block, stage.end_block) for stage in plan.stages],
        "sent_mib_a_step": [
            (after - before) / num_steps / 2**20 for before, after in pairwise([0, *map(_sent_bytes, by_epoch)])
        ],
        "left_out_rows": sum(worker.left_out_rows for worker in steps[num_steps - 1].workers),
        "losses": [step.loss for step in steps],
    }


def _sent_bytes(epoch: Sequence[StepCommitted]) -> int:
    """What all workers have sent until an epoch's end."""
    return sum(worker.sent_bytes for worker in epoch[-1].workers)


def ratios(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Uncached over cached seconds of jobs that differ in the codec alone, and whether raw moved no loss."""
    plain = {(r["shape"], r["agents"]): r for r in found if r["codec"] == "off" and "error" not in r}
    return [
        {
            "shape": r["shape"],
            "agents": r["agents"],
            "codec": r["codec"],
            "uncached_s": base["total_s"],
            "cached_s": r["total_s"],
            "uncached_over_cached": base["total_s"] / r["total_s"],
            "uncached_over_cached_of_a_later_step": base["step_s_by_epoch"][-1] / r["step_s_by_epoch"][-1],
            "first_epoch_over_uncached": r["step_s_by_epoch"][0] / base["step_s_by_epoch"][0],
        }
        for r in found
        if r["codec"] != "off" and "error" not in r and (base := plain.get((r["shape"], r["agents"]))) is not None
    ]


def run_all(cases: Sequence[Case], folder: Path, available: Sequence[int], *, minutes: float) -> bool:
    """Run the cases that have no figures yet, in lanes; False if one failed or there was no time for it."""
    path = folder / "frozen_prefix.json"
    found: list[Case] = json.loads(path.read_text())["runs"] if path.exists() else []
    done = {_key(run) for run in found if "error" not in run}

    def note(case: Case, figures: dict[str, Any]) -> None:
        found[:] = [run for run in found if _key(run) != _key(case)] + [{**case, **figures}]
        path.write_text(json.dumps({"ratios": ratios(found), "runs": found}, indent=1) + "\n")
        print(json.dumps({key: value for key, value in found[-1].items() if key != "losses"}), flush=True)

    waiting = [case for case in cases if _key(case) not in done]
    is_well = run_in_lanes("benchmarks.frozen_prefix", waiting, folder, available, minutes=minutes, on_figures=note)
    for line in ratios(found):
        print(json.dumps(line), flush=True)
    return is_well


def _key(case: Case) -> tuple[Any, ...]:
    return case["shape"], case["codec"], case["agents"], case["epochs"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all that is asked for; 1 if a run failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="cores to use")
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--agents", default="1,2,4")
    parser.add_argument("--shapes", default="d768-12,d1024-24")
    parser.add_argument("--codecs", default="off,raw,int4")
    parser.add_argument("--steps", type=int, default=6, help="of an epoch")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=30.0, help="no job begins later")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    end_when_terminated()
    if options.case is not None:
        return answer_case(options.case, options.out, run)
    if options.quick:
        options.shapes, options.agents, options.steps, options.threads, options.codecs = "quick", "2", 3, 1, "off,raw"
    options.out.mkdir(parents=True, exist_ok=True)
    cases = [
        {"shape": shape, "codec": codec, "agents": agents, "threads": options.threads}
        | {"steps": options.steps, "epochs": options.epochs}
        for shape in reversed(options.shapes.split(","))
        for agents in sorted(map(int, options.agents.split(",")))
        for codec in options.codecs.split(",")
    ]
    available = sorted(os.sched_getaffinity(0))[: options.workers]
    return int(not run_all(cases, options.out, available, minutes=options.minutes))


if __name__ == "__main__":
    sys.exit(main())
