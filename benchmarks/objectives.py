"""Real runs of the objectives: ``python -m benchmarks.objectives [RUN ...] --out DIR [--data DIR]``.

Every run trains on real rows, with several seeds, and says whether its goal is reached. A run with one seed is one
process; ``--workers`` of them run side by side, ``--threads`` each. What a process found is written at once to
``OUT/parts``, and what lies there is not run again, so that an interrupted call goes on. ``OUT/objectives.json`` has
all of it. ``--quick`` takes few rows and steps: it proves that a run works, and no figure of it means anything.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from benchmarks.objective_runs import RUNS, Settings

RESULT_FILE = "objectives.json"


def main() -> int:
    """Run what is asked for; 1 if something failed or missed its goal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN", help=f"of {', '.join(RUNS)}; all if none")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="folder of data sets that are not part of the repository")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    data = None if options.data is None else options.data.resolve()
    if unknown := [name for name in options.runs if name not in RUNS]:
        parser.error(f"no run is called {', '.join(unknown)}; there are {', '.join(RUNS)}")
    names = options.runs or [name for name, run in RUNS.items() if data is not None or not run.needs_data]
    for name in names:
        if RUNS[name].needs_data and data is None:
            parser.error(f"{name} reads data sets that are not part of the repository: give --data")
    parts = options.out / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    todo = []
    for name in names:
        for seed in range(options.seeds):
            part = parts / f"{name}-{seed}{'-quick' if options.quick else ''}.json"
            folder = options.out.resolve() / "work" / part.stem
            todo.append((name, Settings(seed, options.threads, folder, data, options.quick), part))
    left = [one for one in todo if not one[2].exists()]
    failed = _run_all(left, options.workers)
    return _report(todo, options.out, failed)


def _run_all(todo: list[tuple[str, Settings, Path]], workers: int) -> list[str]:
    failed = []
    # Spawned: torch's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, max(1, len(todo))), mp_context=context) as pool:
        futures = {pool.submit(_run_one, name, settings, part): part.stem for name, settings, part in todo}
        for future in as_completed(futures):
            error = future.result()
            print(f"{futures[future]}: {'done' if not error else 'FAILED'}", flush=True)
            if error:
                print(error, flush=True)
                failed.append(futures[future])
    return failed


def _run_one(name: str, settings: Settings, part: Path) -> str:
    """Run one seed and write what it found; gives the traceback of a failure, which must not end the others."""
    import torch

    torch.set_num_threads(settings.threads)
    settings.folder.mkdir(parents=True, exist_ok=True)
    started_s = _processor_s()
    try:
        figures = RUNS[name].run(settings)
    except Exception:
        return traceback.format_exc()
    figures = {"seed": settings.seed, **figures, "processor_s": round(_processor_s() - started_s, 1)}
    unfinished = part.with_suffix(".tmp")
    unfinished.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(part)
    return ""


def _processor_s() -> float:
    """Seconds that this process and its ended children have computed."""
    return sum(os.times()[:4])


def _report(todo: list[tuple[str, Settings, Path]], out: Path, failed: list[str]) -> int:
    found: dict[str, dict[str, Any]] = {}
    is_good = not failed
    for name in dict.fromkeys(name for name, _, _ in todo):
        seeds = [json.loads(part.read_text()) for other, _, part in todo if other == name and part.exists()]
        if not seeds:
            continue
        goal, is_reached = RUNS[name].judge(seeds)
        is_good = is_good and is_reached
        found[name] = {"goal": goal, "is_reached": is_reached, "seeds": seeds}
        print(f"{name}: {'reached' if is_reached else 'MISSED'}, {len(seeds)} seeds: {goal}", flush=True)
    path = out / RESULT_FILE
    path.write_text(json.dumps({"failed": failed, "runs": found}, indent=2) + "\n", encoding="utf-8")
    print(f"{path}", flush=True)
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
