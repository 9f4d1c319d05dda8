"""What a job asks of a pipeline: sizes from its spec, its rows and its model.

Entry points: :func:`shape_for`, :func:`larger_shape`, :func:`may_cut_by_tokens`.
"""

from __future__ import annotations

from itertools import zip_longest
from typing import Any

from coordinator.jobs.prepared import PreparedData
from partitioner.adapter import adapter_params_of
from partitioner.model import ModelTable
from partitioner.shape import JobShape
from plutino.data.batches import steps_per_epoch
from plutino.families import family_of
from plutino.job.frozen_blocks import kept_place
from plutino.job.numerics import NumericsRecord
from plutino.job.spec import JobSpec
from plutino.state_codecs import token_bytes

_MEASURED_ROWS = 4
"""Rows of the micro-batch that devices are measured with, where the job leaves its size open."""

CACHED_WAYS = {
    "auto": ("stages", "data-parallel"),
    "data-parallel": ("data-parallel",),
    "stages": ("stages",),
    "pipeline": ("stages",),
}
"""placement.cached_epochs -> ways that later epochs may take."""


def measured_rows(spec: JobSpec, numerics: NumericsRecord | None) -> int:
    """Rows of the micro-batch that devices are measured with."""
    if numerics is not None:
        return numerics.micro_batch_size
    sampled = spec.training.batch_size * spec.objective.answers_per_row
    samples = spec.training.micro_batch_size or min(_MEASURED_ROWS, sampled)
    return samples * spec.objective.sequences_per_row


def shape_for(spec: JobSpec, prepared: PreparedData, table: ModelTable, dtype: str, rows: int) -> JobShape:
    """What a job asks of a pipeline, at a micro-batch of so many rows."""
    family_of(table.family).refuse_objective(spec.objective)
    adapters = adapter_params_of(table, spec.method)
    per_sample = spec.objective.sequences_per_row
    head_params = table.hidden_size * (spec.objective.num_outputs or len(prepared.class_names))
    fields = adapters.shape_fields
    fields["last_trainable_params"] = fields.get("last_trainable_params", 0) + head_params
    return JobShape(
        dtype="fp32" if dtype == "fp32" else "bf16",
        batch_rows=spec.rows_per_step,
        rows_per_sample=per_sample,
        micro_batch_rows=rows,
        row_tokens=prepared.row_tokens + spec.method.prompt_tokens,
        source_tokens=prepared.source_tokens if table.num_encoder_blocks else 0,
        label_tokens=rows * prepared.label_tokens_per_row,
        may_cut_by_tokens=may_cut_by_tokens(spec),
        **fields,
        has_dropout=spec.method.has_dropout,
        checkpointing=spec.training.checkpointing,
        codec="bf16" if spec.placement.codec == "bf16" else "raw",
        generate_rows=spec.generated_rows,
        generate_tokens=spec.method.prompt_tokens
        + spec.method.past_tokens
        + prepared.prompt_tokens
        + spec.generated_tokens
        if spec.generated_rows
        else 0,
        exact_stages=spec.placement.stages,
        replicas_fold=spec.placement.numerics == "free",
        sums=spec.placement.sums,
        **_cached_fields(spec, prepared, table, 4 if dtype == "fp32" else 2),
    )


def may_cut_by_tokens(spec: JobSpec) -> bool:
    """Whether a plan may cut its micro-batches by tokens; whether it does is known with its stages.

    Where the job names their size they are what they would be on any fleet, so that its bits are. Virtual tokens stand
    before every row, so that more, shorter rows would have more of them than memory is planned for; sampled answers are
    cut when they are known.
    """
    cut, size = spec.training.micro_batch_cut, spec.training.micro_batch_size
    is_refused = spec.method.prompt_tokens + spec.method.past_tokens > 0 or spec.objective.answers_per_row > 1
    return cut == "tokens" or (cut == "auto" and size is None and not is_refused)


def _cached_fields(spec: JobSpec, prepared: PreparedData, table: ModelTable, dtype_bytes: int) -> dict[str, Any]:
    """How many steps come from the activation cache, after a first epoch through the blocks that fills it."""
    codec = spec.training.activation_cache
    place = kept_place(spec, table.num_blocks)
    if codec == "off":
        return {}
    epoch_steps = steps_per_epoch(prepared.num_train, spec.training.batch_size)
    share = max(0, prepared.total_steps - epoch_steps) / epoch_steps
    return {
        "cached_steps_share": share,
        "cached_ways": CACHED_WAYS[spec.placement.cached_epochs],
        "frozen_share": 1.0 if place is None else 1 / (1 + share),
        "entry_token_bytes": token_bytes(codec, table.hidden_size, dtype_bytes),
    }


def larger_shape(one: JobShape, other: JobShape) -> JobShape:
    """A shape that asks as much as either of two jobs on the same rows whose methods differ."""
    fields = {name: _larger(getattr(one, name), getattr(other, name)) for name in JobShape.model_fields}
    return one.model_copy(update=fields)


def _larger(one: Any, other: Any) -> Any:
    """The larger of two numbers, of two numbers a block, or all of two sets of names; else the first."""
    if isinstance(one, int) and isinstance(other, int):
        return max(one, other)
    if isinstance(one, tuple) and isinstance(other, tuple):
        if all(isinstance(name, str) for name in (*one, *other)):
            return tuple(sorted({*one, *other}))
        empty: Any = () if any(isinstance(value, tuple) for value in (*one, *other)) else 0
        return tuple(_larger(*pair) for pair in zip_longest(one, other, fillvalue=empty))
    return one
