"""A plan in words and numbers, as plain text."""

from __future__ import annotations

from collections.abc import Sequence

from partitioner.plan import Plan, RejectedPlan, StagePlan
from plutino.sizes import MIB, format_size

_HEADER = (
    "stage",
    "device",
    "blocks",
    "micro-batches",
    "threads",
    "forward",
    "backward",
    "job",
    "baseline",
    "peak",
    "budget",
)

_CHOICE_HEADER = (
    "method",
    "whole task",
    "a step",
    "later steps",
    "largest worker",
    "sent a step",
    "cache on disk",
    "trained",
)


def explain(plan: Plan) -> str:
    """Stages, memory item by item, the step's seconds, what binds, what would relieve it, and what lost.

    Times are of one micro-batch. A predicted peak is the worker's whole resident memory: its baseline and the job.
    """
    sections = [
        _method_choice(plan),
        _summary(plan) + (f"\n{plan.dtype_why}" if plan.dtype_why else "") + _packing(plan),
        _table(_without_shares(_worker_rows(plan)) if not plan.has_replicas else _worker_rows(plan)),
        "memory of the job, MiB\n" + _table(_memory_rows(plan.stages)),
        f"bottleneck: {plan.bottleneck}\nrelief:     {plan.relief}",
        later_epochs(plan),
        _reasons("rejected", plan.rejected),
        _reasons("unused devices", plan.unused_devices),
        _reasons("remarks", plan.remarks),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _method_choice(plan: Plan) -> str:
    """What was priced before a method was taken, where the job left it open."""
    choice = plan.method_choice
    if choice is None:
        return ""
    rows: list[tuple[str, ...]] = [_CHOICE_HEADER]
    for one in choice.candidates:
        if one.why_not:
            rows.append((one.method, "-", "-", "-", "-", "-", "-", "-"))
            continue
        rows.append(
            (
                one.method,
                f"{one.task_s:.3g} s",
                f"{one.step_s:.3g} s",
                f"{one.later_step_s:.3g} s",
                format_size(one.peak_bytes),
                format_size(one.sent_bytes),
                format_size(one.cache_bytes),
                str(one.trained_params),
            )
        )
    refused = [f"  {one.method}: {one.why_not}" for one in choice.candidates if one.why_not]
    table = _table(rows)
    return "\n".join([f"method: auto takes {choice.why}", table, *(["not possible:", *refused] if refused else [])])


def _summary(plan: Plan) -> str:
    return (
        f"step {plan.step_s:.3g} s, bubble {plan.bubble_share:.0%}: {plan.num_micro_batches} micro-batches of "
        f"{plan.micro_batch_rows} rows, {plan.dtype}, codec {plan.codec_in_words}, sums in {plan.sums}, "
        f"checkpointing {'on' if plan.checkpointing else 'off'}"
    )


def later_epochs(plan: Plan) -> str:
    """Who trains the side network once no block is needed any more, or which blocks still run; empty: all do."""
    if plan.upper is not None:
        of_decoder = f"; kept are the encoder's output and what the decoder's block {plan.upper.place} gets"
        return (
            f"from the activation cache: step {plan.upper.step_s:.3g} s, blocks 0 to {plan.upper.place - 1} run in the "
            f"first epoch alone{of_decoder if plan.upper.keeps_source else ''}"
        )
    cached = plan.cached
    if cached is None or plan.from_cache:
        return ""
    if cached.in_stages:
        return (
            f"from the activation cache, in the same stages: step {cached.step_s:.3g} s, the busiest computing "
            f"{cached.compute_s:.3g} s and reading {cached.read_s:.3g} s; every stage keeps what its own blocks gave, "
            "and none of its gradients travels"
        )
    names = {replica.agent_id: replica.device_name for stage in plan.stages for replica in stage.replicas}
    shares = ", ".join(
        f"{names[agent_id]} {cached.owners.count(place)} of {len(cached.owners)}"
        for place, agent_id in enumerate(cached.agent_ids)
    )
    return (
        f"from the activation cache: step {cached.step_s:.3g} s, of which computing {cached.compute_s:.3g} s, reading "
        f"{cached.read_s:.3g} s, gradients {cached.reduce_s:.3g} s; micro-batches: {shares}"
    )


def _packing(plan: Plan) -> str:
    packing = plan.packing
    if packing.is_plain:
        return f"\nweights unquantised; {plan.packing_why}" if plan.packing_why else ""
    outer = [name for name, held in (("embedding", packing.embedding), ("head", packing.head)) if held != "keep"]
    also = f", {' and '.join(outer)} in int8" if outer else ""
    also += ", multiplied as integers" if packing.products == "integer" else ""
    return f"\nweights {packing.scheme}{also}, {plan.unpacked_share:.1%} of them left unpacked; {plan.packing_why}"


def _worker_rows(plan: Plan) -> list[tuple[str, ...]]:
    """The header and a row for every replica of every stage."""
    rows: list[tuple[str, ...]] = [_HEADER]
    for stage, owners in zip(plan.stages, plan.micro_batch_owners, strict=True):
        for index, replica in enumerate(stage.replicas):
            name = f"{stage.stage_index}.{index}" if stage.further_replicas else str(stage.stage_index)
            share = owners.count(index) if owners else plan.num_micro_batches
            rows.append(
                (
                    name,
                    replica.device_name,
                    f"[{stage.start_block}, {stage.end_block})",
                    f"{share} of {plan.num_micro_batches}",
                    str(replica.threads),
                    f"{replica.forward_s * 1e3:.1f} ms",
                    f"{replica.backward_s * 1e3:.1f} ms",
                    f"{_mib(replica.job_bytes)} MiB",
                    f"+ {_mib(replica.baseline_bytes)} MiB",
                    f"= {_mib(replica.peak_bytes)} MiB",
                    f"of {_mib(replica.budget_bytes)} MiB",
                )
            )
    return rows


def _without_shares(rows: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Where every stage runs on one device, it runs all micro-batches."""
    column = _HEADER.index("micro-batches")
    return [row[:column] + row[column + 1 :] for row in rows]


def _memory_rows(stages: Sequence[StagePlan]) -> list[tuple[str, ...]]:
    names = list(dict.fromkeys(item.name for stage in stages for item in stage.memory))
    bills = [{item.name: item for item in stage.memory} for stage in stages]
    header = ("item", *(f"stage {stage.stage_index}" for stage in stages), "why")
    rows = [header]
    for name in names:
        amounts = [f"{bill[name].bytes / MIB:.1f}" if name in bill else "-" for bill in bills]
        # One stage's reason stands for all: the heaviest one's.
        heaviest = max((bill[name] for bill in bills if name in bill), key=lambda item: item.bytes)
        rows.append((name, *amounts, heaviest.why))
    return rows


def _reasons(title: str, reasons: Sequence[RejectedPlan]) -> str:
    if not reasons:
        return ""
    return "\n".join([f"{title}:", *(f"  {reason.what}: {reason.why}" for reason in reasons)])


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / MIB:.0f}"
