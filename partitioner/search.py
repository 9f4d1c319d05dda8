"""The planner: numbers in, plan with its reasons out.

Entry points: :func:`search` for a given micro-batch, :func:`choose_micro_batch` where the job leaves it open. The
search itself is in :mod:`partitioner.cuts`; here its candidates become a plan that says why it is the one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from partitioner.cost import pipeline_step_time
from partitioner.cuts import Candidate, CutSearch, SearchResult, checkpointing_choices
from partitioner.device import DeviceProfile, LinkTable
from partitioner.memory import MemoryModel, heap_reuse
from partitioner.micro_batch import candidate_rows, scaled_devices, with_rows
from partitioner.model import JobShape, ModelTable
from partitioner.orders import MAX_EXHAUSTIVE_DEVICES
from partitioner.plan import Plan, RejectedPlan, StagePlan
from partitioner.refusal import refuse
from plutino.sizes import format_size

_NOTABLE_SHARE = 0.02
"""A relief that saves less than this share of the step is not worth a sentence."""


def search(
    table: ModelTable, shape: JobShape, devices: Sequence[DeviceProfile], links: LinkTable | None = None
) -> Plan:
    """The plan with the shortest predicted step among those that keep every device within its budget.

    Devices are left out where they would only slow the others. Checkpointing ``auto`` recomputes only where that gives
    a plan or a faster one.

    Args:
        table: the model.
        shape: the job; its micro-batch is the one that the devices' timings are of.
        devices: devices that may be used.
        links: links between them; None: a LAN of 1 Gbit/s.

    Raises:
        InfeasiblePlanError: nothing fits; the message says what would.
    """
    links = links or LinkTable()
    found = _find(table, shape, devices, links)
    if found is None:
        refuse(table, shape, devices, links)
    return _plan(table, shape, devices, links, found)


def choose_micro_batch(
    table: ModelTable,
    shape: JobShape,
    devices: Sequence[DeviceProfile],
    links: LinkTable | None = None,
    *,
    label_tokens_of: Callable[[int], int] | None = None,
) -> Plan:
    """The fastest plan over all micro-batches that divide the batch.

    Args:
        table: the model.
        shape: the job; ``shape.micro_batch_rows`` is the size at which the devices were measured.
        devices: devices that may be used.
        links: links between them.
        label_tokens_of: rows -> largest number of label tokens in one micro-batch of so many rows; None: bounded.

    Raises:
        InfeasiblePlanError: no micro-batch fits; the message is that of the smallest.
    """
    links = links or LinkTable()
    tried = {
        rows: (
            with_rows(shape, rows, label_tokens_of),
            scaled_devices(devices, shape.micro_batch_rows, rows),
        )
        for rows in candidate_rows(shape.batch_rows)
    }
    found = {rows: _find(table, *inputs, links) for rows, inputs in tried.items()}
    fitting = {rows: result for rows, result in found.items() if result is not None}
    if not fitting:
        refuse(table, *tried[min(tried)], links)
    best_rows = min(fitting, key=lambda rows: fitting[rows].best.step_s)
    plan = _plan(table, *tried[best_rows], links, fitting[best_rows])
    rejected = [
        RejectedPlan(
            what=f"micro-batches of {_count(rows, 'row')}",
            why=(
                f"{fitting[rows].best.step_s:.3g} s a step against {plan.step_s:.3g} s"
                if rows in fitting
                else "fit no budget"
            ),
        )
        for rows in tried
        if rows != best_rows
    ]
    return plan.model_copy(update={"rejected": (*plan.rejected, *rejected)})


@dataclass(frozen=True, slots=True)
class _Found:
    """The best candidate, and the searches it came from by their choice of checkpointing."""

    best: Candidate
    results: dict[bool, SearchResult]


def _find(table: ModelTable, shape: JobShape, devices: Sequence[DeviceProfile], links: LinkTable) -> _Found | None:
    results: dict[bool, SearchResult] = {}
    best: Candidate | None = None
    for choice in checkpointing_choices(shape):
        search_cuts = CutSearch(table, shape, _usable(shape, devices), links, checkpointing=choice)
        results[choice] = search_cuts.run(limit_s=math.inf if best is None else best.step_s)
        best = results[choice].best or best
    return None if best is None else _Found(best, results)


def _usable(shape: JobShape, devices: Sequence[DeviceProfile]) -> list[DeviceProfile]:
    return [device for device in devices if shape.dtype in device.dtypes]


def _plan(
    table: ModelTable, shape: JobShape, devices: Sequence[DeviceProfile], links: LinkTable, found: _Found
) -> Plan:
    best, usable = found.best, _usable(shape, devices)
    stages = _stages(table, shape, usable, best)
    return Plan(
        stages=stages,
        micro_batch_rows=shape.micro_batch_rows,
        num_micro_batches=shape.num_micro_batches,
        micro_batch_owners=((0,) * shape.num_micro_batches,) * len(stages),
        checkpointing=best.checkpointing,
        dtype=shape.dtype,
        codec=shape.codec,
        step_s=best.step_s,
        bubble_share=best.time.bubble_share,
        bottleneck=_bottleneck(shape, stages, best),
        relief=_relief(table, shape, usable, links, stages, best),
        rejected=_rejected(usable, found.results, best),
        unused_devices=_unused(table, shape, devices, stages, best),
    )


def _stages(
    table: ModelTable, shape: JobShape, devices: Sequence[DeviceProfile], best: Candidate
) -> tuple[StagePlan, ...]:
    memory = MemoryModel(table, shape)
    stages = []
    for k, device_index in enumerate(best.order):
        device, start, end = devices[device_index], best.cuts[k], best.cuts[k + 1]
        items = memory.items(start, end, num_stages=len(best.order), stage_index=k, checkpointing=best.checkpointing)
        reuse = heap_reuse(items)
        needed_bytes = device.baseline_bytes + sum(item.bytes for item in items) + reuse.bytes
        keeps_heap = needed_bytes <= device.available_bytes
        if keeps_heap:
            items = (*items, reuse)
        stages.append(
            StagePlan(
                stage_index=k,
                start_block=start,
                end_block=end,
                agent_ids=(device.agent_id,),
                device_names=(device.name,),
                forward_s=best.costs[k].forward_s,
                backward_s=best.costs[k].backward_s,
                memory=items,
                job_bytes=sum(item.bytes for item in items),
                baseline_bytes=device.baseline_bytes,
                budget_bytes=device.available_bytes,
                threads=device.threads,
                keeps_heap=keeps_heap,
            )
        )
    return tuple(stages)


def _bottleneck(shape: JobShape, stages: Sequence[StagePlan], best: Candidate) -> str:
    num_micro_batches = shape.num_micro_batches
    k = max(range(len(stages)), key=lambda k: best.costs[k].compute_s)
    link = max(range(len(stages)), key=lambda k: best.costs[k].link_busy_s)
    if best.costs[link].link_busy_s > best.costs[k].compute_s:
        return (
            f"the link from {_name(stages[link])} to {_name(stages[link + 1])}: "
            f"{best.costs[link].link_busy_s:.3g} s each way for every one of {num_micro_batches} micro-batches"
        )
    return (
        f"stage {k} on {_name(stages[k])}: it computes {num_micro_batches * best.costs[k].compute_s:.3g} s "
        f"of the step's {best.step_s:.3g} s"
    )


def _relief(
    table: ModelTable,
    shape: JobShape,
    devices: Sequence[DeviceProfile],
    links: LinkTable,
    stages: Sequence[StagePlan],
    best: Candidate,
) -> str:
    """What would make the step shorter, each with the seconds that a new search or replay gives."""
    target_s = best.step_s * (1 - _NOTABLE_SHARE)
    found: list[tuple[float, str]] = []
    roomy = [device.model_copy(update={"available_bytes": 1 << 62}) for device in devices]
    for choice in checkpointing_choices(shape):
        freed = CutSearch(table, shape, roomy, links, checkpointing=choice).run(limit_s=target_s).best
        if freed is not None:
            target_s = freed.step_s
            found = [(freed.step_s, f"more memory: {_memory_relief(table, shape, devices, freed)}")]
    target_s = best.step_s * (1 - _NOTABLE_SHARE)
    free_links = [replace(cost, link_busy_s=0.0, link_latency_s=0.0) for cost in best.costs]
    unlinked_s = pipeline_step_time(free_links, shape.num_micro_batches).step_s
    if unlinked_s < target_s:
        way = "a faster network" if shape.codec == "bf16" or shape.dtype == "bf16" else "codec bf16 or a faster network"
        found.append((unlinked_s, f"{way}: {unlinked_s:.3g} s a step if the links cost nothing"))
    if found:
        return "; ".join(text for _, text in sorted(found))
    k = max(range(len(stages)), key=lambda k: best.costs[k].compute_s)
    bubble = f"; {best.time.bubble_share:.0%} of the busiest stage's time is bubble" if len(stages) > 1 else ""
    return f"a faster device than {_name(stages[k])}, or one device more{bubble}"


def _memory_relief(table: ModelTable, shape: JobShape, devices: Sequence[DeviceProfile], freed: Candidate) -> str:
    memory = MemoryModel(table, shape)
    needs = []
    for k, device_index in enumerate(freed.order):
        device = devices[device_index]
        job_bytes = memory.job_bytes(
            freed.cuts[k],
            freed.cuts[k + 1],
            num_stages=len(freed.order),
            stage_index=k,
            checkpointing=freed.checkpointing,
        )
        lacking_bytes = device.baseline_bytes + job_bytes - device.available_bytes
        if lacking_bytes > 0:
            needs.append(f"{format_size(lacking_bytes)} more on {device.name}")
    return f"{' and '.join(needs)} would give {freed.step_s:.3g} s a step"


def _rejected(
    devices: Sequence[DeviceProfile], results: dict[bool, SearchResult], best: Candidate
) -> tuple[RejectedPlan, ...]:
    rejected = []
    for choice, result in results.items():
        mode = "on" if choice else "off"
        if choice != best.checkpointing:
            if result.best is None:
                why = "fits no budget" if not choice else f"is not faster than {best.step_s:.3g} s a step"
            else:
                why = f"{result.best.step_s:.3g} s a step against {best.step_s:.3g} s"
            rejected.append(RejectedPlan(what=f"checkpointing {mode}", why=why))
            continue
        for num_stages, candidate in result.best_by_num_stages.items():
            if num_stages == len(best.order):
                continue
            if candidate is None:
                why = f"does not fit, or is not faster than {best.step_s:.3g} s a step"
            else:
                why = f"{candidate.step_s:.3g} s a step against {best.step_s:.3g} s"
            rejected.append(RejectedPlan(what=_count(num_stages, "stage"), why=why))
    if len(devices) > MAX_EXHAUSTIVE_DEVICES:
        rejected.append(
            RejectedPlan(
                what="other orders of devices",
                why=f"not tried: of more than {MAX_EXHAUSTIVE_DEVICES} devices only the fastest and the roomiest are "
                "taken, fastest or roomiest first",
            )
        )
    if not all(result.is_exact for result in results.values()):
        rejected.append(RejectedPlan(what="some other cuts", why="not tried: the search's allowance was used up"))
    return tuple(rejected)


def _unused(
    table: ModelTable,
    shape: JobShape,
    devices: Sequence[DeviceProfile],
    stages: Sequence[StagePlan],
    best: Candidate,
) -> tuple[RejectedPlan, ...]:
    used = {agent_id for stage in stages for agent_id in stage.agent_ids}
    smallest_bytes = _smallest_stage_bytes(table, shape, best.checkpointing)
    unused = []
    for device in devices:
        if device.agent_id in used:
            continue
        if shape.dtype not in device.dtypes:
            why = f"does not run {shape.dtype}, only {', '.join(device.dtypes)}"
        elif device.available_bytes - device.baseline_bytes < smallest_bytes:
            why = (
                f"offers {format_size(device.available_bytes)}; a worker of one block takes "
                f"{format_size(device.baseline_bytes + smallest_bytes)}"
            )
        elif shape.exact_stages is not None and shape.exact_stages == len(stages):
            why = f"the job asks for exactly {_count(shape.exact_stages, 'stage')}"
        else:
            why = f"no plan with it was found that takes less than {best.step_s:.3g} s a step"
        unused.append(RejectedPlan(what=device.name, why=why))
    return tuple(unused)


def _smallest_stage_bytes(table: ModelTable, shape: JobShape, checkpointing: bool) -> int:
    """Job bytes of the lightest stage that a pipeline of any length has."""
    memory = MemoryModel(table, shape)
    # A stage in the middle of three, or the ends of two, or all of one; held for one micro-batch in flight.
    num_blocks = table.num_blocks
    lightest = [
        memory.job_bytes(num_blocks - 1, num_blocks, num_stages=2, stage_index=1, checkpointing=checkpointing),
        memory.job_bytes(0, 1, num_stages=2, stage_index=0, checkpointing=checkpointing),
    ]
    lightest += [
        memory.job_bytes(block, block + 1, num_stages=3, stage_index=1, checkpointing=checkpointing)
        for block in range(1, num_blocks - 1)
    ]
    return min(lightest)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _name(stage: StagePlan) -> str:
    return " + ".join(stage.device_names)
