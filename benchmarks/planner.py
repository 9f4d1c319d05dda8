"""The planner against the exhaustive optimum, against PAC's planner, against budgets, and against the clock.

    python -m benchmarks.planner

Seconds are of the processor (time.process_time): other work on the machine does not count, but for caches. All is
random by seed; every plan of ours and of PAC's is priced by the same simulator. Writes benchmarks/results/planner.json.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from itertools import combinations
from pathlib import Path

from benchmarks.fleets import GIGABIT, device_of, llama_table, lora_job, random_fleet, random_links
from benchmarks.goals import Goal, goal_table
from benchmarks.measure import machine_facts, write_results
from benchmarks.pac import PacPlanner
from partitioner.device import DeviceProfile, LinkTable
from partitioner.memory import stage_memory
from partitioner.model import JobShape, ModelTable
from partitioner.orders import all_layouts
from partitioner.plan import Plan
from partitioner.pricing import Pricer
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


def optimality(num_cases: int, *, proof_work: int) -> dict[str, object]:
    """How much longer the planner's steps are than the best, over small cases."""
    generator = random.Random(1)
    excess: list[float] = []
    wrong_refusals = 0
    while len(excess) < num_cases:
        table = llama_table(generator.randint(3, 7), 512)
        rows = generator.choice([1, 2, 4])
        shape = lora_job(table, batch_rows=8, micro_batch_rows=rows, row_tokens=generator.choice([64, 256]))
        devices, links = random_fleet(
            generator, table, shape, generator.randint(2, 4), tightness=(0.6, 0.9, 1.3, 2.0, 4.0)
        )
        best_s = exhaustive_s(table, shape, devices, links)
        if best_s is None:
            continue
        try:
            plan = search(table, shape, devices, links, allow_replicas=True, proof_work=proof_work)
        except InfeasiblePlanError:
            wrong_refusals += 1
            continue
        assert plan.step_s >= best_s * (1 - 1e-6), "nothing beats every plan"
        excess.append(plan.step_s / best_s - 1)
    return {
        "cases": num_cases,
        "mean_excess": statistics.mean(excess),
        "worst_excess": max(excess),
        "share_above_2_percent": sum(value > 0.02 for value in excess) / num_cases,
        "wrong_refusals": wrong_refusals,
    }


def budgets(num_fleets: int) -> dict[str, object]:
    """Plans whose bills, made anew from the plan alone, exceed a device's budget."""
    generator = random.Random(2)
    planned = refused = over = 0
    for _ in range(num_fleets):
        table = llama_table(generator.randint(2, 24), generator.choice([256, 512, 1024]))
        shape = lora_job(
            table,
            batch_rows=8,
            micro_batch_rows=generator.choice([1, 2, 4, 8]),
            row_tokens=generator.choice([32, 128, 512]),
        )
        devices, links = random_fleet(
            generator, table, shape, generator.randint(1, 8), tightness=(0.3, 0.6, 0.9, 1.2, 2.0)
        )
        try:
            plan = search(table, shape, devices, links, allow_replicas=generator.random() < 0.5, proof_work=500)
        except InfeasiblePlanError:
            refused += 1
            continue
        planned += 1
        over += is_over_budget(plan, table, shape, devices)
    return {"fleets": num_fleets, "planned": planned, "refused": refused, "over_budget": over}


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


def simulated_s(
    plan: Plan, table: ModelTable, shape: JobShape, devices: list[DeviceProfile], links: LinkTable
) -> float:
    """A plan of ours, played by the simulator."""
    pricer = Pricer(table, shape, devices, links)
    position = {device.agent_id: i for i, device in enumerate(devices)}
    layout = tuple(tuple(position[agent] for agent in stage.agent_ids) for stage in plan.stages)
    cuts = (0, *(stage.end_block for stage in plan.stages))
    candidate = pricer.candidate(layout, cuts)
    assert candidate is not None, "the planner's plans fit"
    return simulate_step(candidate.groups, shape.num_micro_batches).step_s


def against_pac(num_fleets: int) -> dict[str, object]:
    """Speed-up over PAC's plans at speeds 4:2:1 and links of 1000 and 100 Mbit/s, at PAC's own micro-batch."""
    generator = random.Random(3)
    ratios: list[float] = []
    over_budget = only_ours = 0
    while len(ratios) < num_fleets:
        table = llama_table(generator.choice([12, 16, 24]), generator.choice([1024, 2048]))
        shape = lora_job(table, batch_rows=generator.choice([16, 32]), micro_batch_rows=4, row_tokens=128)
        devices, links = random_fleet(generator, table, shape, generator.randint(3, 8))
        try:
            ours = search(table, shape, devices, links, allow_replicas=True)
        except InfeasiblePlanError:
            continue
        pac = PacPlanner(table, shape, devices, links)
        theirs = pac.plan()
        if theirs is None:
            only_ours += 1
            continue
        # A plan over its budget would not run; it is priced all the same, as if it did.
        over_budget += bool(pac.over_budget(theirs))
        pac_s = simulate_step(pac.groups(theirs.layout, theirs.cuts), shape.num_micro_batches).step_s
        ratios.append(pac_s / simulated_s(ours, table, shape, devices, links))
    return {
        "fleets": num_fleets,
        "mean_speed_up": statistics.mean(ratios),
        "median_speed_up": statistics.median(ratios),
        "least_speed_up": min(ratios),
        "slower": sum(ratio < 1 - 1e-6 for ratio in ratios),
        "pac_plans_over_budget": over_budget,
        "fleets_only_ours_fits": only_ours,
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


def growth() -> list[dict[str, object]]:
    """Planning over ever more devices."""
    found: list[dict[str, object]] = []
    for num_devices in (10, 100, 1000):
        generator = random.Random(5)
        table = llama_table(80, 1024)
        shape = lora_job(table, batch_rows=32, micro_batch_rows=2, row_tokens=128)
        devices, _ = random_fleet(generator, table, shape, min(num_devices, 10), tightness=(1.0, 1.5, 2.5))
        devices = [
            devices[i % len(devices)].model_copy(
                update={"agent_id": f"id-{i}", "name": f"d{i}", "host_id": f"d{i}", "threads": 4}
            )
            for i in range(num_devices)
        ]
        links = random_links(generator, devices[:60])
        started = time.process_time()
        plan = search(table, shape, devices, links)
        found.append(
            {
                "devices": num_devices,
                "planning_s": time.process_time() - started,
                "step_s": plan.step_s,
                "used_devices": len(plan.agent_ids),
            }
        )
    return found


def loop_s() -> float:
    """Seconds of the processor for a loop of a million additions: how fast this core was while others used it too."""
    started, total = time.process_time(), 0
    for number in range(1_000_000):
        total += number * number
    return time.process_time() - started


def main() -> int:
    """Run everything and write the figures; 1 if a goal is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planner", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few cases: see it run, quote nothing")
    parser.add_argument("--out", type=Path, default=_RESULTS)
    arguments = parser.parse_args()
    share = 50 if arguments.quick else 1
    proved = optimality(500 // share, proof_work=MAX_PROOF_WORK)
    guessed = optimality(500 // share, proof_work=0)
    loops = [loop_s()]
    timed = large(7 if not arguments.quick else 1)
    loops.append(loop_s())
    pac = against_pac(200 // share)
    refused = refusals()
    kept = budgets(10_000 // share)
    grown = growth()
    goals = [
        Goal(name="80 blocks x 16 devices, median", measured=_number(timed["median_s"]), unit="s", at_most=1.0),
        Goal(name="worst excess over the optimum", measured=_number(proved["worst_excess"]), at_most=0.02),
        Goal(name="worst excess without the proof", measured=_number(guessed["worst_excess"]), at_most=0.02),
        Goal(name="plans over budget", measured=_number(kept["over_budget"]), at_most=0),
        Goal(name="fleets on which PAC's plan is faster", measured=_number(pac["slower"]), at_most=0),
        Goal(name="mean speed-up over PAC's plan", measured=_number(pac["mean_speed_up"]), at_least=1.3),
        Goal(name="slowest refusal", measured=max(_number(r["seconds"]) for r in refused), unit="s", at_most=1.0),
    ]
    document = {
        "machine": machine_facts(["numpy", "pydantic"]),
        "seconds": "of the processor, one thread",
        "loop_of_a_million_s": loops,
        "goals": [goal.to_dict() for goal in goals],
        "optimality": proved,
        "optimality_without_proof": guessed,
        "large": timed,
        "against_pac": pac,
        "refusals": refused,
        "budgets": kept,
        "growth": grown,
    }
    print(goal_table(goals))
    for row in grown:
        print("  ".join(f"{name} {value:.3g}" for name, value in row.items() if isinstance(value, int | float)))
    if not arguments.quick or arguments.out != _RESULTS:
        write_results(arguments.out, document)
    return 0 if all(goal.is_met for goal in goals) else 1


def _number(value: object) -> float:
    assert isinstance(value, int | float), value
    return float(value)


if __name__ == "__main__":
    sys.exit(main())
