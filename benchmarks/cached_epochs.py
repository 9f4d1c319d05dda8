"""Epochs from the activation cache against first epochs, over real agents: seconds, memory, disk, what moves.

    python -m benchmarks.cached_epochs --out DIR [--workers N --threads T --agents 1,2,4 --shapes NAME,... --quick]

A coordinator and agents run as processes, each agent on its own cores with folders of its own; ``--workers`` bounds the
cores. For every shape, codec and number of agents one job of three epochs with parallel adapters (k = 8) leaves its
pipeline after the first. Weights and tokens are random; a quarter of each row carries loss. Written to
``DIR/cached_epochs.json`` after every run; what is there already is not run again.
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
from pathlib import Path
from typing import Any

from benchmarks.job_watch import JobWatch
from benchmarks.model_folder import write_drawn_base
from benchmarks.peers.workload import Workload
from benchmarks.stack import PlutinoStack
from partitioner.plan import Plan
from plutino.events import JobEvent, JobStateChanged, PlanChanges, PlanMade, StepCommitted, WorkerLoaded
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
_TIMEOUT_S = 1800.0


def job_of(workload: Workload, folder: Path, codec: str, num_agents: int, num_steps: int, threads: int) -> JobSpec:
    """A job of three epochs that leaves its pipeline after the first."""
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
            "model": {"path": str(model.model_dir)},
            "method": {"type": "parallel_adapters", "reduction": 8},
            "data": {"train": str(rows_path), "max_tokens": workload.seq_len_tokens},
            "training": {
                "epochs": EPOCHS,
                "batch_size": workload.batch_size,
                "micro_batch_size": workload.batch_size // workload.num_micro_batches,
                "lr": 1e-3,
                "activation_cache": codec,
                "shadow_every": num_steps,
            },
            "placement": {
                "stages": num_agents,
                "threads": threads,
                "replan": "never",
                "replicas": "never",
                "cached_epochs": "data-parallel",
            },
            # Drawn weights lie in no file that an adapter could be verified against.
            "output": {"publish": False},
        }
    )


def run(
    name: str, codec: str, num_agents: int, threads: int, num_steps: int, cores: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """One job; what was measured of it."""
    workload = replace(SHAPES[name], batch_size=ROWS_PER_STEP, num_micro_batches=NUM_MICRO_BATCHES)
    agents = [f"agent{index}" for index in range(num_agents)]
    with (
        tempfile.TemporaryDirectory(prefix="cached-epochs-") as work,
        PlutinoStack(_made(Path(work) / "state")) as stack,
    ):
        stack.start_agents(
            dict.fromkeys(agents, 8 << 30),
            threads=dict.fromkeys(agents, threads),
            cores=dict(zip(agents, cores, strict=False)) if cores else None,
            has_own_caches=True,
        )
        spec = job_of(workload, Path(work) / "job", codec, num_agents, num_steps, threads)
        started_s = time.monotonic()
        watch = JobWatch(stack.client, stack.client.submit(spec))
        seen: list[tuple[float, JobEvent]] = []
        while (event := watch.next(_TIMEOUT_S)) is not None:
            seen.append((time.monotonic() - started_s, event))
        watch.join()
        disk_bytes = sum(path.stat().st_size for path in (Path(work) / "state" / "caches").rglob("*.data"))
    return {"shape": name, "codec": codec, "agents": num_agents, "threads": threads} | _figures(
        seen, num_steps, disk_bytes
    )


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _figures(seen: Sequence[tuple[float, JobEvent]], num_steps: int, disk_bytes: int) -> dict[str, Any]:
    steps = [event for _, event in seen if isinstance(event, StepCommitted)]
    plans = [Plan.model_validate_json(event.plan_json) for _, event in seen if isinstance(event, PlanMade)]
    by_epoch = [steps[first : first + num_steps] for first in range(0, len(steps), num_steps)]
    # The first step of a plan also fills caches and the allocator; moves are counted by themselves.
    medians_s = [statistics.median(step.seconds for step in epoch[1:]) for epoch in by_epoch]
    changes_s = [at_s for at_s, event in seen if isinstance(event, PlanChanges)]
    running_s = [at_s for at_s, event in seen if isinstance(event, JobStateChanged) and event.state == "running"]
    loaded = [(at_s, event) for at_s, event in seen if isinstance(event, WorkerLoaded)]
    return {
        "total_s": seen[-1][0],
        "first_epoch_step_s": medians_s[0],
        "cached_step_s": medians_s[1:],
        "cached_over_first": statistics.mean(medians_s[1:]) / medians_s[0],
        "predicted_cached_step_s": plans[0].cached.step_s if plans[0].cached is not None else None,
        "predicted_first_step_s": plans[0].step_s,
        "owners": list(plans[0].cached.owners) if plans[0].cached is not None else None,
        "to_cached_s": min((at_s - changes_s[0] for at_s in running_s if at_s > changes_s[0]), default=None),
        "loaded_rss_mib": [
            (event.plan_epoch, event.worker.device_name, event.rss_bytes >> 20, event.bytes_read >> 20)
            for _, event in loaded
        ],
        "peak_rss_mib": [
            max(worker.peak_rss_bytes for step in epoch for worker in step.workers) >> 20 for epoch in by_epoch
        ],
        "sent_mib_a_step": [
            sum(worker.sent_bytes for worker in epoch[-1].workers) / len(epoch) / 2**20 for epoch in by_epoch
        ],
        "left_out_rows": sum(worker.left_out_rows for worker in steps[num_steps - 1].workers),
        "entries_mib": disk_bytes / 2**20,
        "losses": [step.loss for step in steps],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all that is asked for; 1 if a run failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="cores to use")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--agents", default="1,2,4")
    parser.add_argument("--shapes", default="d768-12,d768-12-v32k,d1024-24")
    parser.add_argument("--codecs", default="raw,int4")
    parser.add_argument("--steps", type=int, default=6, help="of an epoch")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    if options.quick:
        options.shapes, options.agents, options.steps = "quick", "2", 3
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "cached_epochs.json"
    found: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    done = {(run["shape"], run["codec"], run["agents"]) for run in found if "error" not in run}
    available = sorted(os.sched_getaffinity(0))[: options.workers]
    failed = False
    for shape in options.shapes.split(","):
        for num_agents in map(int, options.agents.split(",")):
            for codec in options.codecs.split(","):
                if (shape, codec, num_agents) in done:
                    continue
                needed = num_agents * options.threads
                cores = (
                    [available[i * options.threads : (i + 1) * options.threads] for i in range(num_agents)]
                    if needed <= len(available)
                    else []
                )
                try:
                    figures = run(shape, codec, num_agents, options.threads, options.steps, cores)
                except Exception as error:
                    figures = {"shape": shape, "codec": codec, "agents": num_agents, "error": repr(error)[-3000:]}
                    failed = True
                figures["has_own_cores"] = bool(cores)
                found = [r for r in found if (r["shape"], r["codec"], r["agents"]) != (shape, codec, num_agents)]
                found.append(figures)
                path.write_text(json.dumps(found, indent=1) + "\n")
                print(json.dumps({key: value for key, value in figures.items() if key != "losses"}), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
