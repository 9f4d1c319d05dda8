"""Epochs from the activation cache against first epochs, over real agents: seconds, memory, disk, what moves.

    python -m benchmarks.cached_epochs --out DIR [--workers N --threads T --agents 1,2,4 --shapes NAME,... --quick]

A coordinator and agents run as processes, each agent on its own cores with folders of its own, every job in a lane of
cores that no other job has; ``--workers`` bounds the cores of all lanes. For every shape and number of agents there is
one job a kind: ``raw`` and ``int4`` are three epochs with parallel adapters (k = 8) that leave their pipeline after the
first; ``off`` is one epoch of them without a cache, which says what writing it costs; ``full`` is two steps of full
fine-tuning, whose memory theirs is held against. All in fp32, with random weights and tokens; a quarter of each row
carries loss. Written to ``DIR/cached_epochs.json`` after every run; what is there already is not run again.
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
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.cores import physical_first
from benchmarks.job_watch import JobWatch
from benchmarks.lanes import Case, answer_case, end_when_terminated, run_in_lanes
from benchmarks.model_folder import write_drawn_base
from benchmarks.peers.workload import Workload
from benchmarks.stack import PlutinoStack
from partitioner.plan import Plan
from plutino.events import JobEvent, JobStateChanged, Moved, PlanChanges, PlanMade, StepCommitted, WorkerLoaded
from plutino.job.spec import JobSpec

SHAPES = {
    "d768-12": Workload(num_blocks=12, hidden_dim=768, intermediate_dim=2048, num_heads=12, vocab_size=8000),
    "d768-12-v32k": Workload(num_blocks=12, hidden_dim=768, intermediate_dim=2048, num_heads=12, vocab_size=32000),
    "d1024-24": Workload(num_blocks=24, hidden_dim=1024, intermediate_dim=2752, num_heads=16, vocab_size=8000),
    "quick": Workload(
        num_blocks=4, hidden_dim=128, intermediate_dim=256, num_heads=8, vocab_size=500, seq_len_tokens=32
    ),
}
ROWS_PER_STEP, NUM_MICRO_BATCHES, EPOCHS = 32, 8, 3
AGENT_BYTES = 12 << 30
_TIMEOUT_S = 1800.0


def job_of(workload: Workload, folder: Path, kind: str, num_agents: int, num_steps: int, threads: int) -> JobSpec:
    """A job of one kind: of three epochs that leaves its pipeline after the first, or of one."""
    is_cached = kind not in ("off", "full")
    model = write_drawn_base(workload, folder, num_steps=num_steps)
    rows_path = folder / "quarter.jsonl"
    draw = random.Random(workload.seed)
    lines = []
    for _ in range(num_steps * workload.batch_size):
        num_tokens = draw.randint(workload.seq_len_tokens * 3 // 4, workload.seq_len_tokens - 2)
        words = [f"t{draw.randrange(1, workload.vocab_size)}" for _ in range(num_tokens)]
        cut = len(words) * 3 // 4
        lines.append(json.dumps({"prompt": " ".join(words[:cut]), "completion": " " + " ".join(words[cut:])}))
    rows_path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return JobSpec.model_validate(
        {
            "name": "cached epochs",
            # As the published figures are; devices that multiply bf16 faster would choose that.
            "model": {"path": str(model.model_dir), "dtype": "fp32"},
            "method": {"type": "full"} if kind == "full" else {"type": "parallel_adapters", "reduction": 8},
            "data": {"train": str(rows_path), "max_tokens": workload.seq_len_tokens},
            "training": {
                **({"steps": 2} if kind == "full" else {"epochs": EPOCHS if is_cached else 1}),
                "batch_size": workload.batch_size,
                "micro_batch_size": workload.batch_size // workload.num_micro_batches,
                "lr": 1e-3,
                "activation_cache": kind if is_cached else "off",
                "shadow_every": num_steps,
            },
            "placement": {
                "stages": num_agents,
                "threads": threads,
                "replan": "never",
                "replicas": "never",
                **({"cached_epochs": "data-parallel"} if is_cached else {}),
            },
            # Drawn weights lie in no file that an adapter could be verified against.
            "output": {"publish": False},
        }
    )


def run(case: Case, cores: Sequence[Sequence[int]]) -> dict[str, Any]:
    """One job; what was measured of it."""
    num_agents, num_steps, threads = (int(case[name]) for name in ("agents", "steps", "threads"))
    workload = replace(SHAPES[case["shape"]], batch_size=ROWS_PER_STEP, num_micro_batches=NUM_MICRO_BATCHES)
    agents = [f"agent{index}" for index in range(num_agents)]
    with (
        tempfile.TemporaryDirectory(prefix="cached-epochs-") as work,
        PlutinoStack(_made(Path(work) / "state")) as stack,
    ):
        stack.start_agents(
            dict.fromkeys(agents, AGENT_BYTES),
            threads=dict.fromkeys(agents, threads),
            cores=dict(zip(agents, cores, strict=False)) if cores else None,
            has_own_caches=True,
        )
        baselines = {device["name"]: int(device["baseline_bytes"]) for device in stack.client.devices()}
        spec = job_of(workload, Path(work) / "job", case["codec"], num_agents, num_steps, threads)
        started_s = time.monotonic()
        watch = JobWatch(stack.client, stack.client.submit(spec))
        seen: list[tuple[float, JobEvent]] = []
        while (event := watch.next(_TIMEOUT_S)) is not None:
            seen.append((time.monotonic() - started_s, event))
        watch.join()
        disk_bytes = sum(path.stat().st_size for path in (Path(work) / "state" / "caches").rglob("*.data"))
    return {"has_own_cores": bool(cores)} | _figures(seen, num_steps, disk_bytes, baselines)


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _figures(
    seen: Sequence[tuple[float, JobEvent]], num_steps: int, disk_bytes: int, baselines: Mapping[str, int]
) -> dict[str, Any]:
    steps = [event for _, event in seen if isinstance(event, StepCommitted)]
    plans = [Plan.model_validate_json(event.plan_json) for _, event in seen if isinstance(event, PlanMade)]
    by_epoch = [steps[first : first + num_steps] for first in range(0, len(steps), num_steps)]
    # The first step of a plan also fills caches and the allocator; moves are counted by themselves.
    medians_s = [statistics.median(step.seconds for step in epoch[1:]) for epoch in by_epoch]
    moves_s = _moves_s(seen)
    loaded = [(at_s, event) for at_s, event in seen if isinstance(event, WorkerLoaded)]
    return {
        "total_s": seen[-1][0],
        "first_epoch_step_s": medians_s[0],
        "cached_step_s": medians_s[1:],
        "cached_over_first": statistics.mean(medians_s[1:]) / medians_s[0] if medians_s[1:] else None,
        "epoch_s": [sum(step.seconds for step in epoch) for epoch in by_epoch],
        "moves_s": moves_s,
        "moves": [event.model_dump() for _, event in seen if isinstance(event, Moved)],
        "predicted_cached_step_s": plans[0].cached.step_s if plans[0].cached is not None else None,
        "predicted_first_step_s": plans[0].step_s,
        "owners": list(plans[0].cached.owners) if plans[0].cached is not None else None,
        "loaded_rss_mib": [
            (event.plan_epoch, event.worker.device_name, event.rss_bytes >> 20, event.bytes_read >> 20)
            for _, event in loaded
        ],
        "peak_rss_mib": [
            max(worker.peak_rss_bytes for step in epoch for worker in step.workers) >> 20 for epoch in by_epoch
        ],
        "peak_job_mib": [
            max(w.peak_rss_bytes - baselines[w.worker.device_name] for step in epoch for w in step.workers) >> 20
            for epoch in by_epoch
        ],
        "sent_mib_a_step": [
            sum(worker.sent_bytes for worker in epoch[-1].workers) / len(epoch) / 2**20 for epoch in by_epoch
        ],
        "left_out_rows": sum(worker.left_out_rows for worker in by_epoch[0][-1].workers),
        "entries_mib": disk_bytes / 2**20,
        "losses": [step.loss for step in steps],
    }


def _moves_s(seen: Sequence[tuple[float, JobEvent]]) -> list[float]:
    """Seconds of each change of phase: from the decision, behind a commit, until the job runs again."""
    found = []
    for at_s, event in seen:
        if isinstance(event, PlanChanges):
            again_s = (s for s, e in seen if s >= at_s and isinstance(e, JobStateChanged) and e.state == "running")
            found.append(next(again_s, at_s) - at_s)
    return found


def ratios(found: Sequence[Case]) -> list[dict[str, Any]]:
    """What the goals ask for, of every cached job, as far as its fellows have run."""
    of = {(r["shape"], r["agents"], r["codec"]): r for r in found if "error" not in r}
    rows = []
    for (shape, agents, codec), run in of.items():
        if codec in ("off", "full"):
            continue
        off, full = of.get((shape, agents, "off")), of.get((shape, agents, "full"))
        alone = of.get((shape, 1, codec))
        cached_s = statistics.mean(run["cached_step_s"])
        rows.append(
            {
                "shape": shape,
                "agents": agents,
                "codec": codec,
                "cached_over_first": run["cached_over_first"],
                "writing": run["first_epoch_step_s"] / off["first_epoch_step_s"] - 1 if off else None,
                "moves_over_all": sum(run["moves_s"]) / run["total_s"],
                "job_bytes_over_full": [mib / max(full["peak_job_mib"]) for mib in run["peak_job_mib"]]
                if full
                else None,
                "cached_speedup_over_one_agent": statistics.mean(alone["cached_step_s"]) / cached_s if alone else None,
            }
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all that is asked for; 1 if a run failed or there was no time for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="cores to use")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--agents", default="1,2,4")
    parser.add_argument("--shapes", default="d768-12,d768-12-v32k,d1024-24")
    parser.add_argument("--codecs", default="int4,raw,off,full")
    parser.add_argument("--steps", type=int, default=6, help="of an epoch")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    end_when_terminated()
    if options.case is not None:
        return answer_case(options.case, options.out, run)
    if options.quick:
        options.shapes, options.agents, options.steps = "quick", "2", 3
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "cached_epochs.json"
    found: list[Case] = json.loads(path.read_text())["runs"] if path.exists() else []
    done = {_key(run) for run in found if "error" not in run}
    cases = [
        {"shape": shape, "codec": codec, "agents": agents, "threads": options.threads, "steps": options.steps}
        for shape in options.shapes.split(",")
        for agents in map(int, options.agents.split(","))
        for codec in options.codecs.split(",")
    ]

    def note(case: Case, figures: dict[str, Any]) -> None:
        found[:] = [run for run in found if _key(run) != _key(case)] + [{**case, **figures}]
        path.write_text(json.dumps({"ratios": ratios(found), "runs": found}, indent=1) + "\n")
        print(json.dumps({key: value for key, value in found[-1].items() if key != "losses"}), flush=True)

    available = physical_first(sorted(os.sched_getaffinity(0)))[: options.workers]
    waiting = [case for case in cases if _key(case) not in done]
    is_well = run_in_lanes(
        "benchmarks.cached_epochs", waiting, options.out, available, minutes=options.minutes, on_figures=note
    )
    for row in ratios(found):
        print(json.dumps(row), flush=True)
    return int(not is_well)


def _key(case: Case) -> tuple[Any, ...]:
    return case["shape"], case["codec"], case["agents"]


if __name__ == "__main__":
    sys.exit(main())
