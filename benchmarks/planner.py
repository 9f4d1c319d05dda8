"""The planner against the exhaustive optimum, against PAC's planner, against budgets, and against the clock.

    python -m benchmarks.planner --workers 16 --out results

Seconds are of the processor (time.process_time): other work on the machine does not count, but for caches. All is
random by seed, and the same however many processes share it; every plan of ours and of PAC's is priced by the same
simulator. The file is written anew after every share.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.fleets import GIGABIT, device_of, llama_table, lora_job, random_fleet
from benchmarks.goals import Goal, goal_table
from benchmarks.measure import machine_facts, write_results
from benchmarks.planner_cases import Figures, budgets_share, optimality_share, pac_share, run_shares
from partitioner.device import LinkTable
from partitioner.search import choose_micro_batch, search
from plutino.errors import InfeasiblePlanError
from plutino.sizes import MIB

_RESULTS = Path(__file__).parent / "results"
_QUICK = 50
"""A quick run has so many times fewer cases."""


def optimality(shares: Sequence[Figures]) -> Figures:
    """Mean and worst excess over the optimum."""
    figures: Figures = {
        "cases": sum(len(share["with_proof"]) for share in shares),
        "wrong_refusals": sum(share["wrong_refusals"] for share in shares),
    }
    for name in ("with_proof", "without_proof"):
        values = [value for share in shares for value in share[name]]
        figures[name] = {
            "mean_excess": statistics.mean(values),
            "worst_excess": max(values),
            "cases_above_2_percent": sum(value > 0.02 for value in values),
        }
    return figures


def budgets(shares: Sequence[Figures]) -> Figures:
    """Counts of all shares."""
    return {name: sum(share[name] for share in shares) for name in shares[0]}


def against_pac(shares: Sequence[Figures]) -> Figures:
    """Spread of the speed-up over PAC's plans, over all of them and over those that keep the budgets."""
    ratios = [ratio for share in shares for ratio in share["ratios"]]
    within = [ratio for share in shares for ratio in share["ratios_within_budget"]]
    return {
        "fleets": len(ratios),
        "fleets_only_ours_fits": sum(share["only_ours_fits"] for share in shares),
        "pac_within_budget": len(within),
        "pac_faster_by_cutting_rows_in_a_group": sum(share["pac_cuts_rows_where_faster"] for share in shares),
        "all": _spread(ratios),
        "where_pac_is_within_budget": _spread(within),
    }


def _spread(ratios: Sequence[float]) -> dict[str, float]:
    if not ratios:
        return {}
    return {
        "mean_speed_up": statistics.mean(ratios),
        "median_speed_up": statistics.median(ratios),
        "least_speed_up": min(ratios),
        "times_slower": sum(ratio < 1 - 1e-6 for ratio in ratios),
    }


def large(num_turns: int) -> Figures:
    """80 blocks on 16 unlike devices: micro-batch, codec, order, replicas and checkpointing all open."""
    generator = random.Random(4)
    seconds = []
    for _ in range(num_turns):
        table = llama_table(80, 1024)
        shape = lora_job(table, batch_rows=16, micro_batch_rows=4, row_tokens=128)
        devices, links = random_fleet(generator, table, shape, 16, tightness=(1.0, 1.5, 2.5))
        devices = [
            device.model_copy(update={"available_bytes": device.available_bytes + generator.randrange(64) * MIB})
            for device in devices
        ]
        started = time.process_time()
        choose_micro_batch(table, shape, devices, links, codecs=("raw", "bf16"), allow_replicas=True)
        seconds.append(time.process_time() - started)
    return {"turns": num_turns, "median_s": statistics.median(seconds), "worst_s": max(seconds)}


def refusals() -> list[Figures]:
    """Seconds of the processor until a job that does not fit is refused with its way out."""
    found: list[Figures] = []
    for num_blocks, num_devices in ((200, 3), (200, 12), (400, 16)):
        table = llama_table(num_blocks, 512)
        shape = lora_job(table, batch_rows=16, micro_batch_rows=16, row_tokens=512)
        devices = [device_of(f"d{i}", 1 + i / 7, (100 + 3 * i) * MIB, table, shape) for i in range(num_devices)]
        reason, started = "", time.process_time()
        try:
            search(table, shape, devices, LinkTable(other=GIGABIT))
        except InfeasiblePlanError as error:
            reason = str(error)
        seconds = time.process_time() - started
        assert "Way out" in reason, "this job does not fit"
        found.append({"blocks": num_blocks, "devices": num_devices, "seconds": seconds})
    return found


def growth(share: int) -> Figures:
    """See :mod:`benchmarks.growth`, which alone needs what a coordinator needs."""
    from benchmarks.growth import growth as whole

    return whole(share)


def loop_s() -> float:
    """Seconds of the processor for a loop of a million additions: how fast this core was while others used it too."""
    started, total = time.process_time(), 0
    for number in range(1_000_000):
        total += number * number
    return time.process_time() - started


def _once(figures: Callable[[int], object]) -> Callable[[int, int, int], Iterator[object]]:
    def run(fleets: int, share: int, workers: int) -> Iterator[object]:
        yield figures(share)

    return run


def _shared(
    work: Callable[[int, int], Figures], joined: Callable[[Sequence[Figures]], Figures], cases: int, at_once: int
) -> Callable[[int, int, int], Iterator[object]]:
    def run(fleets: int, share: int, workers: int) -> Iterator[object]:
        return map(joined, run_shares(work, max(1, (cases or fleets) // share), at_once, workers))

    return run


_PARTS: dict[str, Callable[[int, int, int], Iterator[object]]] = {
    "large": _once(lambda share: large(max(1, 7 // share))),
    "refusals": _once(lambda share: refusals()),
    "optimality": _shared(optimality_share, optimality, 500, 10),
    "against_pac": _shared(pac_share, against_pac, 200, 5),
    "budgets": _shared(budgets_share, budgets, 0, 50),
    "growth": _once(growth),
}
"""Name -> (fleets of the part budgets, how many times fewer cases, processes) -> figures, better and better."""


def goals_of(found: Mapping[str, Any]) -> list[Goal]:
    """The goals of the parts that were run."""
    goals: list[Goal] = []
    if "large" in found:
        median_s = found["large"]["median_s"]
        goals.append(Goal(name="80 blocks x 16 devices, median", measured=median_s, unit="s", at_most=1.0))
    if "refusals" in found:
        slowest_s = max(row["seconds"] for row in found["refusals"])
        goals.append(Goal(name="slowest refusal", measured=slowest_s, unit="s", at_most=1.0))
    if "optimality" in found:
        for name in ("with_proof", "without_proof"):
            worst = found["optimality"][name]["worst_excess"]
            goals.append(Goal(name=f"worst excess over the optimum {name}", measured=worst, at_most=0.02))
    if "against_pac" in found:
        all_fleets, within = found["against_pac"]["all"], found["against_pac"]["where_pac_is_within_budget"]
        goals.append(Goal(name="mean speed-up over PAC", measured=all_fleets["mean_speed_up"], at_least=1.3))
        slower = within.get("times_slower", 0)
        goals.append(Goal(name="times PAC's plan fits and is faster", measured=slower, at_most=0))
    if "budgets" in found:
        goals.append(Goal(name="plans over budget", measured=found["budgets"]["over_budget"], at_most=0))
    return goals


def main() -> int:
    """Run the parts and write the figures, those of parts run before kept; 1 if a goal is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planner", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few cases: see it run, quote nothing")
    parser.add_argument("--parts", nargs="+", choices=list(_PARTS), default=list(_PARTS), help="only these")
    parser.add_argument("--fleets", type=int, default=10_000, help="of the part budgets")
    parser.add_argument("--workers", type=int, default=1, help="processes that share cases")
    parser.add_argument("--threads", type=int, default=1, help="of each process's matrix products")
    parser.add_argument("--out", type=Path, default=_RESULTS, help="folder of planner.json")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = str(arguments.threads)
    path = arguments.out / "planner.json"
    is_kept = not arguments.quick or arguments.out != _RESULTS
    document = json.loads(path.read_text()) if is_kept and path.exists() else {}
    share = _QUICK if arguments.quick else 1
    for part in arguments.parts:
        before_s = loop_s()
        for figures in _PARTS[part](arguments.fleets, share, arguments.workers):
            document[part] = figures
            _write(path if is_kept else None, document)
        document.setdefault("loop_of_a_million_s", {})[part] = [before_s, loop_s()]
        print(part, json.dumps(document[part]), flush=True)
    goals = _write(path if is_kept else None, document)
    if goals:
        print(goal_table(goals))
    return 0 if all(goal.is_met for goal in goals) else 1


def _write(path: Path | None, document: dict[str, Any]) -> list[Goal]:
    goals = goals_of(document)
    document |= {
        "machine": machine_facts(["numpy", "pydantic"]),
        "seconds": "of the processor, one thread",
        "goals": [goal.to_dict() for goal in goals],
    }
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_results(path, document)
    return goals


if __name__ == "__main__":
    sys.exit(main())
