"""Shares of the planner's benchmark that any process can work on: the same cases wherever and beside whatever they run.

Entry point: :func:`run_shares`. A share is a few cases with a seed of its own.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import combinations
from multiprocessing import get_context
from typing import Any

from benchmarks.fleets import llama_table, lora_job, random_fleet
from benchmarks.pac_planner import PacPlanner
from partitioner.device import DeviceProfile, LinkProfile, LinkTable
from partitioner.fitting import fits
from partitioner.layout import replica_shares
from partitioner.memory import MemoryModel
from partitioner.model import ModelTable
from partitioner.orders import all_layouts
from partitioner.plan import Plan
from partitioner.pricing import Pricer
from partitioner.report import play, replayed
from partitioner.search import MAX_PROOF_WORK, choose_micro_batch, search
from partitioner.shape import JobShape
from partitioner.simulate import simulate_step
from plutino.errors import InfeasiblePlanError

Figures = dict[str, Any]

_QUICK_LINK = LinkProfile(bandwidth_bytes_per_s=5e9, latency_s=1e-5)


def run_shares(
    work: Callable[[int, int], Figures], num_cases: int, cases_at_once: int, num_processes: int
) -> Iterator[list[Figures]]:
    """Work on all shares; gives what is done so far, in the shares' order, each time one more is.

    Args:
        work: seed and number of cases -> figures, a function of a module.
        num_cases: of all shares.
        cases_at_once: of one share.
        num_processes: that work.
    """
    sizes = [min(cases_at_once, num_cases - first) for first in range(0, num_cases, cases_at_once)]
    done: dict[int, Figures] = {}
    # Spawned: a fork would take this process's threads' locks along.
    with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn")) as pool:
        numbers = {pool.submit(work, seed, size): seed for seed, size in enumerate(sizes)}
        for future in as_completed(numbers):
            done[numbers[future]] = future.result()
            print(f"{work.__name__}: {len(done)} of {len(sizes)} shares", file=sys.stderr, flush=True)
            yield [done[seed] for seed in sorted(done)]


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


def optimality_share(seed: int, num_cases: int) -> Figures:
    """How much longer the planner's steps are than the best, over small cases, with its proof and without."""
    generator = random.Random(f"optimality {seed}")
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
    return {"wrong_refusals": wrong_refusals, **excess}


def budgets_share(seed: int, num_fleets: int) -> Figures:
    """Plans whose bills, made anew from the plan alone, exceed a device's budget.

    Half of the fleets have more devices than the job wants stages, and quick links: there replicas pay.
    """
    generator = random.Random(f"budgets {seed}")
    counts = dict.fromkeys(("fleets", "planned", "planned_with_replicas", "nothing_fits", "over_budget"), 0)
    tables = [llama_table(generator.randint(2, 16), generator.choice([256, 512, 1024])) for _ in range(6)]
    for _ in range(num_fleets):
        table = generator.choice(tables)
        allow_replicas = generator.random() < 0.5
        shape = lora_job(
            table,
            batch_rows=32 if allow_replicas else 8,
            micro_batch_rows=generator.choice([1, 2, 4] if allow_replicas else [1, 2, 4, 8]),
            row_tokens=generator.choice([32, 128, 512]),
            rank=generator.choice([1, 4]) if allow_replicas else 8,
        )
        num_devices, tightness = generator.randint(1, 6), [0.5, 0.8, 1.0, 1.5, 3.0]
        if allow_replicas:
            num_devices, tightness = generator.randint(2, 6), [1.5, 2.5, 4.0, 6.0]
            shape = shape.model_copy(update={"exact_stages": generator.choice([1, 2])})
        devices, links = random_fleet(generator, table, shape, num_devices, tightness=tightness)
        if allow_replicas:
            links = LinkTable(other=_QUICK_LINK)
        counts["fleets"] += 1
        if not fits(table, shape, devices):
            counts["nothing_fits"] += 1
            continue
        plan = search(table, shape, devices, links, allow_replicas=allow_replicas, proof_work=0)
        counts["planned"] += 1
        counts["planned_with_replicas"] += plan.has_replicas
        counts["over_budget"] += bool(over_budget(plan, table, shape, devices))
    return counts


def over_budget(plan: Plan, table: ModelTable, shape: JobShape, devices: Sequence[DeviceProfile]) -> list[str]:
    """Devices whose worker takes more than the device offers, by the plan's bill or by one made anew."""
    position = {device.agent_id: i for i, device in enumerate(devices)}
    layout = tuple(tuple(position[agent_id] for agent_id in stage.agent_ids) for stage in plan.stages)
    memory = MemoryModel(table, shape)
    over = []
    for k, stage in enumerate(plan.stages):
        for share, replica in zip(replica_shares(layout, k, plan.micro_batch_owners[k]), stage.replicas, strict=True):
            device = devices[position[replica.agent_id]]
            job_bytes = memory.job_bytes(
                stage.start_block,
                stage.end_block,
                num_stages=len(plan.stages),
                stage_index=k,
                checkpointing=stage.checkpointing,
                share=share,
            )
            if max(replica.peak_bytes, device.baseline_bytes + job_bytes) > device.available_bytes:
                over.append(device.name)
    return over


def pac_share(seed: int, num_fleets: int) -> Figures:
    """Speed-up over PAC's plans at speeds 4:2:1 and links of 1000 and 100 Mbit/s.

    PAC cuts its micro-batch of 4 rows once more for each group; ours chooses the rows of a micro-batch. A plan of PAC's
    that breaks a budget would not run: it is priced as if it did, and counted apart.
    """
    generator = random.Random(f"pac {seed}")
    found: Figures = {"ratios": [], "ratios_within_budget": [], "only_ours_fits": 0, "pac_cuts_rows_where_faster": 0}
    while len(found["ratios"]) < num_fleets:
        table = llama_table(generator.choice([12, 16, 24]), generator.choice([1024, 2048]))
        shape = lora_job(table, batch_rows=generator.choice([16, 32]), micro_batch_rows=4, row_tokens=128)
        devices, links = random_fleet(generator, table, shape, generator.randint(3, 8), tightness=(1.5, 3.0, 6.0))
        if not fits(table, shape, devices):
            continue
        # PAC's bits depend on the plan; so may ours here.
        shape = shape.model_copy(update={"replicas_fold": True})
        ours = choose_micro_batch(table, shape, devices, links, allow_replicas=True, proof_work=0)
        pac = PacPlanner(table, shape, devices, links)
        theirs = pac.plan()
        if theirs is None:
            found["only_ours_fits"] += 1
            continue
        ours_s = play(ours, replayed(ours, table, shape, devices, links)).step_s
        pac_s = simulate_step(pac.groups(theirs.layout, theirs.cuts), shape.num_micro_batches).step_s
        found["ratios"].append(pac_s / ours_s)
        if not pac.over_budget(theirs):
            found["ratios_within_budget"].append(pac_s / ours_s)
            is_slower = pac_s / ours_s < 1 - 1e-6
            found["pac_cuts_rows_where_faster"] += is_slower and any(len(group) > 1 for group in theirs.layout)
    return found
