"""What a job's numerics record fixes, held against every later plan of the job: pure.

Whichever way a new plan comes about (a device was lost or has joined, one became slow, the coordinator restarted, the
job changes its phase), its problem goes through :func:`kept_problem`, and its plan past :func:`broken_by`.
"""

from __future__ import annotations

from coordinator.scheduling.problem import PlanningProblem
from partitioner.micro_batch import scaled_devices, with_rows
from partitioner.plan import Plan
from partitioner.reasons import count
from plutino.job.numerics import NumericsRecord


def kept_problem(problem: PlanningProblem, numerics: NumericsRecord) -> PlanningProblem:
    """The problem with everything as the record has it, devices' seconds at its micro-batch included."""
    at_rows = with_micro_batch(problem, numerics.micro_batch_size)
    fixed = {
        "dtype": numerics.dtype,
        "packing": numerics.packing,
        "codec": numerics.codecs,
        "bf16_borders": numerics.bf16_borders,
        "replicas_fold": numerics.replicas_fold,
        "sums": numerics.sums,
        "may_cut_by_tokens": numerics.micro_batch_cut == "tokens",
    }
    return at_rows.model_copy(update={"shape": at_rows.shape.model_copy(update=fixed), "codecs": ()})


def with_micro_batch(problem: PlanningProblem, rows: int) -> PlanningProblem:
    """The problem with a micro-batch of so many rows, which the planner may not change any more."""
    fixed = problem.model_copy(update={"is_micro_batch_free": False})
    if rows == problem.shape.micro_batch_rows:
        return fixed
    devices = tuple(scaled_devices(problem.devices, problem.shape.micro_batch_rows, rows))
    shape = with_rows(problem.shape, rows, lambda number: number * problem.label_tokens_per_row)
    return fixed.model_copy(update={"shape": shape, "devices": devices})


def broken_by(plan: Plan, numerics: NumericsRecord) -> str | None:
    """What a plan has otherwise than the record; None: it keeps all of it."""
    found = [
        ("micro-batches of", plan.micro_batch_rows, numerics.micro_batch_size),
        ("dtype", plan.dtype, numerics.dtype),
        ("weights held as", plan.packing, numerics.packing),
        ("sums in", plan.sums, numerics.sums),
        *(
            (
                f"at the border of block {stage.end_block} codec",
                stage.codec or plan.codec,
                numerics.codec_at(stage.end_block),
            )
            for stage in plan.stages[:-1]
        ),
    ]
    return next((f"{what} {has} instead of {wanted}" for what, has, wanted in found if has != wanted), None)


def in_words(numerics: NumericsRecord) -> str:
    """A sentence on what a later plan cannot change, and what a person can do where nothing fits under it."""
    held = "unquantised weights" if numerics.packing.is_plain else f"{numerics.packing.scheme} weights"
    by_tokens = " on the mean with like numbers of tokens" if numerics.micro_batch_cut == "tokens" else ""
    fixed = [f"micro-batches of {count(numerics.micro_batch_size, 'row')}{by_tokens}", numerics.dtype, held]
    fixed.append(f"{numerics.codecs} boundaries")
    if numerics.bf16_borders:
        fixed.append(f"bf16 at the borders of blocks {', '.join(str(border) for border in numerics.bf16_borders)}")
    if numerics.threads_per_worker is not None:
        fixed.append(f"{count(numerics.threads_per_worker, 'thread')} a worker")
    return (
        f"The job's numerics record fixes {', '.join(fixed)}: another setting counts for a job that is submitted anew, "
        "and placement.numerics: free lets a job choose the size of its micro-batches again with every plan"
    )
