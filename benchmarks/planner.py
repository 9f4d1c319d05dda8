"""The planner against the exhaustive optimum, against PAC's planner, against budgets, and against the clock.

    python -m benchmarks.planner

Seconds are of the processor (time.process_time): other work on the machine does not count, but for caches. All is
random by seed; every plan of ours and of PAC's is priced by the same simulator. Writes benchmarks/results/planner.json.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import combinations
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.fleets import GIGABIT, device_of, llama_table, lora_job, random_fleet
from benchmarks.goals import Goal, goal_table
from benchmarks.growth import growth
from benchmarks.measure import machine_facts, write_results
from benchmarks.pac import PacPlanner
from partitioner.device import DeviceProfile, LinkTable
from partitioner.fitting import fits
from partitioner.memory import stage_memory
from partitioner.model import JobShape, ModelTable
from partitioner.orders import all_layouts
from partitioner.plan import Plan
from partitioner.pricing import Pricer
from partitioner.report import play, replayed
from partitioner.search import MAX_PROOF_WORK, choose_micro_batch, search
from partitioner.simulate import simulate_step
from plutino.errors import InfeasiblePlanError
from plutino.sizes import MIB

_RESULTS = Path(__file__).parent / "results" / "planner.json"


def exhaustive_s(table: ModelTable, shape: JobShape, devices: list[DeviceProfile], links: LinkTable) -> float | None:
    """The shortest step over every layout with replicas and every cut; None if nothing fits."""
    pricer = Pricer(table, shape, devices, links)
    layouts = all_layouts(devices, links, max_stages=min(len(devices), table.num_blocks), allow_replicas=True)
    assert layouts is not None, "only asked of small fleets"
    best_s = float("inf")
    for layout in layouts:
        every = [(0, *inner, table.num_blocks) for inner in combinations(range(1, table.num_blocks), len(layout) - 1)]
        best_s = min(best_s, float(pricer.step_seconds(layout, every).min()))
    return best_s if best_s < float("inf") else None


_FLEETS_AT_ONCE = 50
_BUDGET_COUNTS = ("fleets", "planned", "planned_with_replicas", "nothing_fits", "over_budget")


def optimality(num_cases: int) -> dict[str, object]:
    """How much longer the planner's steps are than the best, over small cases, with its proof and without."""
    generator = random.Random(1)
    excess: dict[str, list[float]] = {"with_proof": [], "without_proof": []}
    wrong_refusals = 0
    while len(excess["with_proof"]) < num_cases:
        table = llama_table(generator.randint(3, 7), 512)
        rows = generator.choice([1, 2, 4])
        shape = lora_job(table, batch_rows=8, micro_batch_rows=rows, row_tokens=generator.choice([64, 256]))
        devices, links = random_fleet(
            generator, table, shape, generator.randint(2, 4), tightness=(0.6, 0.9, 1.3, 2.0, 4.0)
        )
        best_s = exhaustive_s(table, shape, devices, links)
        if best_s is None:
            continue
        for name, proof_work in (("with_proof", MAX_PROOF_WORK), ("without_proof", 0)):
            try:
                plan = search(table, shape, devices, links, allow_replicas=True, proof_work=proof_work)
            except InfeasiblePlanError:
                wrong_refusals += 1
                continue
            assert plan.step_s >= best_s * (1 - 1e-6), "nothing beats every plan"
            excess[name].append(plan.step_s / best_s - 1)
    figures: dict[str, object] = {"cases": num_cases, "wrong_refusals": wrong_refusals}
    for name, values in excess.items():
        figures[name] = {
            "mean_excess": statistics.mean(values),
            "worst_excess": max(values),
            "cases_above_2_percent": sum(value > 0.02 for value in values),
        }
    return figures


def budgets(num_fleets: int, num_processes: int = 1) -> dict[str, object]:
    """Plans whose bills, made anew from the plan alone, exceed a device's budget.

    Fleets are the same however many processes share them.
    """
    shares = [min(_FLEETS_AT_ONCE, num_fleets - first) for first in range(0, num_fleets, _FLEETS_AT_ONCE)]
    total: Counter[str] = Counter()
    # Spawned: a fork would take this process's threads' locks along.
    with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn")) as pool:
        for number, counts in enumerate(pool.map(_budgets_of, range(len(shares)), shares), start=1):
            total.update(counts)
            print(f"budgets: {number} of {len(shares)} parts, {dict(total)}", file=sys.stderr, flush=True)
    return {name: total[name] for name in _BUDGET_COUNTS}


def _budgets_of(seed: int, num_fleets: int) -> dict[str, int]:
    generator = random.Random(f"budgets {seed}")
    planned = with_replicas = nothing_fits = over = 0
    tables = [llama_table(generator.randint(2, 16), generator.choice([256, 512, 1024])) for _ in range(6)]
    for _ in range(num_fleets):
        table = generator.choice(tables)
        shape = lora_job(
            table,
            batch_rows=8,
            micro_batch_rows=generator.choice([1, 2, 4, 8]),
            row_tokens=generator.choice([32, 128, 512]),
        )
        devices, links = random_fleet(
            generator, table, shape, generator.randint(1, 6), tightness=(0.5, 0.8, 1.0, 1.5, 3.0)
        )
        allow_replicas = generator.random() < 0.5
        if not fits(table, shape, devices):
            nothing_fits += 1
            continue
        plan = search(table, shape, devices, links, allow_replicas=allow_replicas, proof_work=0)
        planned += 1
        with_replicas += any(len(stage.replicas) > 1 for stage in plan.stages)
        over += is_over_budget(plan, table, shape, devices)
    return {
        "fleets": num_fleets,
        "planned": planned,
        "planned_with_replicas": with_replicas,
        "nothing_fits": nothing_fits,
        "over_budget": over,
    }


def is_over_budget(plan: Plan, table: ModelTable, shape: JobShape, devices: list[DeviceProfile]) -> bool:
    """Whether a device's worker takes more than the device offers; single workers are priced anew."""
    offered = {device.agent_id: device for device in devices}
    for stage in plan.stages:
        for replica in stage.replicas:
            peak_bytes = replica.peak_bytes
            if len(stage.replicas) == 1 and all(len(other.replicas) == 1 for other in plan.stages):
                items = stage_memory(
                    table,
                    shape,
                    start_block=stage.start_block,
                    end_block=stage.end_block,
                    num_stages=len(plan.stages),
                    stage_index=stage.stage_index,
                    checkpointing=stage.checkpointing,
                )
                peak_bytes = max(peak_bytes, offered[replica.agent_id].baseline_bytes + sum(i.bytes for i in items))
            if peak_bytes > offered[replica.agent_id].available_bytes:
                return True
    return False


def against_pac(num_fleets: int) -> dict[str, object]:
    """Speed-up over PAC's plans at speeds 4:2:1 and links of 1000 and 100 Mbit/s.

    PAC cuts its micro-batch of 4 rows once more for each group; ours chooses the rows of a micro-batch. A plan of PAC's
    that breaks a budget would not run: it is priced as if it did, and counted apart.
    """
    generator = random.Random(3)
    ratios: list[float] = []
    ratios_within: list[float] = []
    only_ours = 0
    while len(ratios) < num_fleets:
        table = llama_table(generator.choice([12, 16, 24]), generator.choice([1024, 2048]))
        shape = lora_job(table, batch_rows=generator.choice([16, 32]), micro_batch_rows=4, row_tokens=128)
        devices, links = random_fleet(generator, table, shape, generator.randint(3, 8), tightness=(1.5, 3.0, 6.0))
        if not fits(table, shape, devices):
            continue
        ours = choose_micro_batch(table, shape, devices, links, allow_replicas=True, proof_work=0)
        pac = PacPlanner(table, shape, devices, links)
        theirs = pac.plan()
        if theirs is None:
            only_ours += 1
            continue
        ours_s = play(ours, replayed(ours, table, shape, devices, links)).step_s
        pac_s = simulate_step(pac.groups(theirs.layout, theirs.cuts), shape.num_micro_batches).step_s
        ratios.append(pac_s / ours_s)
        if not pac.over_budget(theirs):
            ratios_within.append(ratios[-1])
    return {
        "fleets": num_fleets,
        "fleets_only_ours_fits": only_ours,
        "pac_within_budget": len(ratios_within),
        "all": _spread(ratios),
        "where_pac_is_within_budget": _spread(ratios_within),
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


def large(num_turns: int) -> dict[str, object]:
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


def refusals() -> list[dict[str, object]]:
    """Seconds of the processor until a job that does not fit is refused with its way out."""
    found: list[dict[str, object]] = []
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


def loop_s() -> float:
    """Seconds of the processor for a loop of a million additions: how fast this core was while others used it too."""
    started, total = time.process_time(), 0
    for number in range(1_000_000):
        total += number * number
    return time.process_time() - started


_BUDGETS = "budgets"
_PARTS: dict[str, Callable[[int], object]] = {
    "large": lambda share: large(max(1, 7 // share)),
    "refusals": lambda share: refusals(),
    "growth": growth,
    "optimality": lambda share: optimality(500 // share),
    "against_pac": lambda share: against_pac(200 // share),
}


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
    parts = [*_PARTS, _BUDGETS]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts, help="only these")
    parser.add_argument("--fleets", type=int, default=10_000, help="of the part budgets")
    parser.add_argument("--processes", type=int, default=1, help="that share the part budgets")
    parser.add_argument("--out", type=Path, default=_RESULTS)
    arguments = parser.parse_args()
    is_kept = not arguments.quick or arguments.out != _RESULTS
    document = json.loads(arguments.out.read_text()) if is_kept and arguments.out.exists() else {}
    for part in arguments.parts:
        before_s = loop_s()
        if part == _BUDGETS:
            document[part] = budgets(50 if arguments.quick else arguments.fleets, arguments.processes)
        else:
            document[part] = _PARTS[part](50 if arguments.quick else 1)
        document.setdefault("loop_of_a_million_s", {})[part] = [before_s, loop_s()]
        print(part, json.dumps(document[part]), flush=True)
    goals = goals_of(document)
    document |= {
        "machine": machine_facts(["numpy", "pydantic"]),
        "seconds": "of the processor, one thread",
        "goals": [goal.to_dict() for goal in goals],
    }
    if goals:
        print(goal_table(goals))
    if is_kept:
        write_results(arguments.out, document)
    return 0 if all(goal.is_met for goal in goals) else 1


if __name__ == "__main__":
    sys.exit(main())
