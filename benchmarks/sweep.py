"""What a sweep of twelve trials costs beside twelve jobs: ``python -m benchmarks.sweep [--halving] [--steps N]``.

Two devices made of processes on this machine, the bundled model and data; first the sweep, then every trial as a job of
its own, one after the other as a person would hand them in, base model scored and adapter published each time. Compared
are seconds of processor, those of processes that have ended included: they hardly depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import psutil
import yaml

from benchmarks.job_watch import JobWatch
from benchmarks.measure import RESULTS_DIR
from benchmarks.stack import PlutinoStack
from coordinator.sweeps.grid import expand, label
from plutino.assets import SNIPS_DIR, TINY_LLAMA_DIR
from plutino.errors import JobError
from plutino.sizes import GIB
from plutino.sweep import Halving, SweepSpec, SweepStatus

GOAL = 0.5
SETTINGS = (
    "method=lora,adapters,prompt",
    "method.rank=4,16",
    "method.bottleneck=16,64",
    "method.num_virtual_tokens=8,16",
    "training.lr=1e-3,3e-3",
)
_SWEEP_TIMEOUT_S = 7200.0
_JOB_TIMEOUT_S = 1800.0
_BUDGETS_BYTES = {"first": 2 * GIB, "second": 2 * GIB}


def main() -> int:
    """Measure, print, keep the figures, and give 1 if the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=12, help="trials that are also run as jobs, spread over all")
    parser.add_argument("--halving", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="plutino-sweep-") as folder, PlutinoStack(Path(folder)) as stack:
        stack.start_agents(_BUDGETS_BYTES)
        spec = _sweep(Path(folder), options.steps, Halving(min_steps=2) if options.halving else None)
        started_s, used_s = time.monotonic(), _processor_s()
        status = _run_sweep(stack, spec)
        sweep_s, sweep_used_s = time.monotonic() - started_s, _processor_s() - used_s
        print(f"sweep: {sweep_s:.1f} s, {sweep_used_s:.1f} s of processor", flush=True)
        jobs_s, jobs_used_s = [], []
        for trial in spec.trials[:: max(1, len(spec.trials) // options.jobs)]:
            started_s, used_s = time.monotonic(), _processor_s()
            watch = JobWatch(stack.client, stack.client.submit(trial.spec))
            while watch.next(_JOB_TIMEOUT_S) is not None:
                pass
            watch.join()
            jobs_s.append(time.monotonic() - started_s)
            jobs_used_s.append(_processor_s() - used_s)
            print(f"{label(trial.settings)}: {jobs_s[-1]:.1f} s, {jobs_used_s[-1]:.1f} s of processor", flush=True)
    factor = len(spec.trials) / len(jobs_s)
    ratio = sweep_used_s / (factor * sum(jobs_used_s))
    print(f"{len(jobs_s)} jobs: {sum(jobs_s):.1f} s, {sum(jobs_used_s):.1f} s of processor")
    of_clock = sweep_s / (factor * sum(jobs_s))
    print(f"ratio to {len(spec.trials)} such jobs {ratio:.3f} (goal {GOAL}), of the clock {of_clock:.3f}")
    figures = {
        "steps": options.steps,
        "halving": options.halving,
        "sweep": {"clock_s": sweep_s, "processor_s": sweep_used_s},
        "jobs": {"clock_s": jobs_s, "processor_s": jobs_used_s},
        "ratio": ratio,
        "status": status.model_dump(mode="json"),
    }
    path = RESULTS_DIR / f"sweep{'_halving' if options.halving else ''}.json"
    path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0 if ratio <= GOAL else 1


def _sweep(folder: Path, steps: int, halving: Halving | None) -> SweepSpec:
    job = {
        "name": "sweep",
        "model": {"path": str(TINY_LLAMA_DIR), "dtype": "fp32"},
        "data": {
            "train": str(SNIPS_DIR / "train.jsonl"),
            "eval": str(SNIPS_DIR / "validation.jsonl"),
            "eval_limit": 40,
        },
        "scoring": {"metric": "exact_match", "max_new_tokens": 12},
        "training": {
            "steps": steps,
            "batch_size": 16,
            "micro_batch_size": 8,
            "warmup_steps": 2,
            "checkpointing": "off",
        },
        "placement": {"stages": 2},
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job), encoding="utf-8")
    return SweepSpec(name="sweep", trials=expand(path, SETTINGS), halving=halving)


def _run_sweep(stack: PlutinoStack, spec: SweepSpec) -> SweepStatus:
    sweep_id = stack.client.sweeps.submit(spec)
    deadline_s = time.monotonic() + _SWEEP_TIMEOUT_S
    while not (status := stack.client.sweeps.status(sweep_id)).has_ended:
        if time.monotonic() > deadline_s:
            raise JobError(f"the sweep did not end within {_SWEEP_TIMEOUT_S:.0f} s; logs: {stack.logs()}")
        time.sleep(2.0)
    if status.state != "succeeded":
        raise JobError(f"the sweep is {status.state}: {status.reason}; logs: {stack.logs()}")
    return status


def _processor_s() -> float:
    """Of all processes that this one started, and of those that they have reaped."""
    total_s = 0.0
    for process in psutil.Process().children(recursive=True):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue  # ended between the listing and the look; its parent reaps it
        total_s += times.user + times.system + times.children_user + times.children_system
    return total_s


if __name__ == "__main__":
    sys.exit(main())
