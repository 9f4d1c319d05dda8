"""Feeding units of work to the workers and collecting what comes of them."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Literal

from coordinator.jobs.context import JobContext
from coordinator.jobs.prepared import PreparedData, TaskRows
from coordinator.jobs.scoring import ScoreReport
from coordinator.scheduling.problem import stage_shapes
from plutino.errors import ConfigError
from plutino.job.assignment import StageShape
from plutino.job.objective_part import GENERATED_METRICS
from plutino.types import Unit, UnitKind, WorkerRef
from plutino.wire.channel import Lane
from plutino.wire.convert import row_values_from_proto, unit_to_proto
from protos import runners_pb2 as runner_pb
from protos import workers_pb2 as pb

PROBE_ROWS = 8
"""Training rows on which the published adapter's loss is compared with the pipeline's."""


@dataclass(frozen=True, slots=True)
class Batch:
    """A unit's rows as the runner gave them."""

    parts: tuple[runner_pb.BatchPart, ...]
    answers_per_row: int = 1
    """A sample's number is its row's position times this, and more where answers are sampled."""

    @property
    def loss_weight(self) -> float:
        """What the whole unit's loss is divided by."""
        return self.parts[0].loss_weight

    @property
    def num_tokens(self) -> int:
        """Tokens without padding."""
        return sum(sum(part.rows.lengths) for part in self.parts)

    @property
    def num_label_tokens(self) -> int:
        """Tokens that carry loss."""
        return sum(part.rows.label_mask.count(1) for part in self.parts)

    @property
    def sample_indices(self) -> tuple[int, ...]:
        """Rows of the data set, in the order they are fed."""
        numbers = (index // self.answers_per_row for part in self.parts for index in part.sample_indices)
        return tuple(dict.fromkeys(numbers)) if self.answers_per_row > 1 else tuple(numbers)


async def train_batch(context: JobContext, step: int) -> Batch:
    """The rows of a training step."""
    numerics = context.numerics
    ask = runner_pb.GetTrainBatch(
        step=step, micro_batch_size=numerics.micro_batch_size, micro_batch_cut=numerics.micro_batch_cut
    )
    return await ask_batch(context, runner_pb.RunnerCommand(get_train_batch=ask))


def feed(
    context: JobContext,
    unit: Unit,
    batch: Batch,
    generate: pb.GenerateOptions | None = None,
    *,
    without_adapter: bool = False,
    is_recorded: bool = False,
    by_reward_adapter: bool = False,
) -> None:
    """Send a unit to all workers: rows to those that read them, a header to the others.

    Raises:
        ConfigError: a micro-batch is too large for a control message.
    """
    context.workers.begin_unit(unit)
    refs, shapes = tuple(context.refs()), stage_shapes(context.plan)
    is_generation = generate is not None
    all_readers: set[WorkerRef] = set()
    for part in batch.parts:
        readers = [ref for ref in refs if reads_rows(ref, shapes, part.micro_batch, is_generation=is_generation)]
        all_readers.update(readers)
        message = pb.Feed(
            unit=unit_to_proto(unit),
            num_micro_batches=len(batch.parts),
            loss_weight=batch.loss_weight,
            micro_batch=part.micro_batch,
            rows=part.rows,
            without_adapter=without_adapter,
            recorded=is_recorded,
            by_reward_adapter=by_reward_adapter,
        )
        if generate is not None:
            message.generate.CopyFrom(generate)
            message.generate.sample_indices.extend(part.sample_indices)
        if message.ByteSize() > Lane.CONTROL - 1024:
            raise ConfigError(
                f"a micro-batch of {len(part.rows.lengths)} rows with {sum(part.rows.lengths)} tokens takes "
                f"{message.ByteSize()} bytes, a message may have {Lane.CONTROL.value}; lower micro_batch_size "
                "(or scoring.batch_rows)"
            )
        context.workers.tell(pb.WorkerCommand(feed=message), key=f"feed {unit} part {part.micro_batch}", only=readers)
    others = [ref for ref in refs if ref not in all_readers]
    if others:
        header = pb.Feed(
            unit=unit_to_proto(unit),
            num_micro_batches=len(batch.parts),
            loss_weight=batch.loss_weight,
            micro_batch=len(batch.parts),
            without_adapter=without_adapter,
            recorded=is_recorded,
            by_reward_adapter=by_reward_adapter,
        )
        context.workers.tell(pb.WorkerCommand(feed=header), key=f"feed {unit} header", only=others)


def reads_rows(ref: WorkerRef, shapes: Sequence[StageShape], micro_batch: int, *, is_generation: bool) -> bool:
    """Whether a worker needs the rows of a micro-batch. Generation runs on the first replica of every stage."""
    if is_generation:
        return ref.replica_index == 0
    is_its_own = shapes[ref.stage_index].replica_of(micro_batch) == ref.replica_index
    return is_its_own and ref.stage_index in (0, len(shapes) - 1)


def end_unit(context: JobContext, unit: Unit) -> None:
    """Nothing of the unit is sent or kept any more."""
    context.workers.forget(f"feed {unit} ")
    context.workers.end_unit(unit)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What an evaluation measured."""

    loss_sum: float
    loss_weight: float
    """Of what the loss is the mean over; the loss is the sum over this."""
    values: dict[int, list[float]]
    """Row -> what the objective says of it, both answers of a pair one after the other; empty if nothing."""

    @property
    def loss(self) -> float:
        """The mean loss."""
        return self.loss_sum / self.loss_weight


async def evaluate(
    context: JobContext,
    *,
    num_rows: int,
    start_row: int = 0,
    source: Literal["held-out", "training", "general"] = "held-out",
    use_adapter: bool = True,
    by_token: bool = False,
) -> Evaluation:
    """Loss of some rows of a set, and what the objective says of them; see :meth:`JobRunner.eval_batch`."""
    loss_sum, loss_weight = 0.0, 0.0
    values: dict[int, list[float]] = {}
    # At least the probe's rows, so that it is one unit and cut in one way.
    batch_rows = max(context.spec.training.batch_size, PROBE_ROWS)
    end_row = start_row + num_rows
    for first in range(start_row, end_row, batch_rows):
        ask = runner_pb.GetEvalBatch(
            start_row=first,
            num_rows=min(batch_rows, end_row - first),
            micro_batch_size=context.numerics.micro_batch_size,
            from_training=source == "training",
            general=source == "general",
            by_token=by_token,
        )
        batch = await ask_batch(context, runner_pb.RunnerCommand(get_eval_batch=ask))
        measured = await evaluate_batch(context, batch, use_adapter=use_adapter)
        loss_sum, loss_weight = loss_sum + measured.loss_sum, loss_weight + measured.loss_weight
        values |= measured.values
    return Evaluation(loss_sum, loss_weight, values)


async def evaluate_batch(
    context: JobContext, batch: Batch, *, use_adapter: bool = True, by_reward_adapter: bool = False
) -> Evaluation:
    """One unit of evaluation."""
    unit = await context.new_unit(UnitKind.EVALUATE)
    without_adapter = not (use_adapter or _is_base_still(context))
    loss_sum, values = 0.0, dict[int, list[float]]()
    async with _running(context, unit):
        feed(context, unit, batch, without_adapter=without_adapter, by_reward_adapter=by_reward_adapter)
        for done in await _all_done(context, unit):
            loss_sum += done.loss_sum
            values |= _values_by_row(batch, done)
    return Evaluation(loss_sum, batch.loss_weight, values)


def _values_by_row(batch: Batch, done: pb.UnitDone) -> dict[int, list[float]]:
    values: dict[int, list[float]] = {}
    parts = {part.micro_batch: part for part in batch.parts}
    for message in done.row_values:
        part = parts[message.micro_batch]
        of_rows = row_values_from_proto(message, num_rows=len(part.rows.lengths))
        # Both sequences of a pair are one row of the data set.
        of_samples = of_rows.reshape(len(part.sample_indices), -1)
        values |= {int(row): own.tolist() for row, own in zip(part.sample_indices, of_samples, strict=True)}
    return values


async def probe_batch(context: JobContext, prepared: PreparedData) -> Batch:
    """The training rows that the published adapter is verified on, cut as :func:`evaluate` cuts them."""
    ask = runner_pb.GetEvalBatch(
        start_row=0,
        num_rows=min(PROBE_ROWS, prepared.num_probe),
        micro_batch_size=context.numerics.micro_batch_size,
        from_training=True,
    )
    return await ask_batch(context, runner_pb.RunnerCommand(get_eval_batch=ask))


def _is_base_still(context: JobContext) -> bool:
    """Whether the trained weights are the base model's own, which they are before the first step if at all."""
    return context.spec.method.trains_weights and context.record.next_step == 0


async def score(
    context: JobContext, prepared: PreparedData, *, use_adapter: bool, few_shot: bool = False
) -> tuple[ScoreReport, float]:
    """Score all held-out rows, each task's as its metric asks; gives the seconds that it took, too."""
    started_s = time.monotonic()
    rows: dict[int, list[float]] = {}
    perplexities: dict[str, float] = {}
    for task in prepared.tasks:
        num_rows = task.end_row - task.start_row
        if task.metric in GENERATED_METRICS:
            rows |= await _answers(context, prepared, task, use_adapter=use_adapter, few_shot=few_shot)
            continue
        is_perplexity = task.metric == "perplexity"
        seen = await evaluate(
            context, start_row=task.start_row, num_rows=num_rows, use_adapter=use_adapter, by_token=is_perplexity
        )
        rows |= seen.values
        if is_perplexity:
            # A float's range ends at exp(709); a loss of that size is as good as any above it.
            perplexities[task.name] = math.exp(min(seen.loss, 700.0))
    ask = runner_pb.Score(rows_json=json.dumps(rows), perplexities=perplexities)
    answer = await context.runner.ask(runner_pb.RunnerCommand(score=ask))
    return ScoreReport.model_validate_json(answer[-1].scored.json), time.monotonic() - started_s


async def _answers(
    context: JobContext, prepared: PreparedData, task: TaskRows, *, use_adapter: bool, few_shot: bool
) -> dict[int, list[float]]:
    """Generated tokens by row."""
    scoring = context.spec.scoring
    assert scoring is not None, "scoring is asked for by the spec"
    num_groups = len(context.plan.stages)
    rows: dict[int, list[float]] = {}
    for start_row in range(task.start_row, task.end_row, num_groups * scoring.batch_rows):
        ask = runner_pb.GetPrompts(
            start_row=start_row,
            num_groups=num_groups,
            group_rows=scoring.batch_rows,
            end_row=task.end_row,
            few_shot=few_shot,
        )
        batch = await ask_batch(context, runner_pb.RunnerCommand(get_prompts=ask))
        options = pb.GenerateOptions(
            max_new_tokens=scoring.max_new_tokens,
            temperature=scoring.temperature,
            stop_tokens=prepared.stop_token_ids,
            use_adapter=use_adapter or _is_base_still(context),
            step=context.record.next_step,
        )
        rows |= {row: list(tokens) for row, tokens in (await generate_batch(context, batch, options)).items()}
    return rows


async def generate_batch(context: JobContext, batch: Batch, options: pb.GenerateOptions) -> dict[int, tuple[int, ...]]:
    """One unit of generation: new tokens by sample."""
    unit = await context.new_unit(UnitKind.GENERATE)
    async with _running(context, unit):
        feed(context, unit, batch, options)
        return {row.row: tuple(row.tokens) for done in await _all_done(context, unit) for row in done.rows}


async def ask_batch(context: JobContext, command: runner_pb.RunnerCommand, *, answers_per_row: int = 1) -> Batch:
    """Rows that the runner gives to a question."""
    return Batch(tuple(event.batch_part for event in await context.runner.ask(command)), answers_per_row)


@asynccontextmanager
async def _running(context: JobContext, unit: Unit) -> AsyncIterator[None]:
    """Whatever happens, the workers do not go on with a unit that nobody waits for."""
    try:
        yield
    except (Exception, asyncio.CancelledError):
        context.workers.forget(f"feed {unit} ")
        context.workers.tell(pb.WorkerCommand(cancel_unit=pb.CancelUnit(unit=unit_to_proto(unit))))
        raise
    finally:
        end_unit(context, unit)


async def _all_done(context: JobContext, unit: Unit) -> list[pb.UnitDone]:
    await context.workers.wait(lambda: all(unit in status.done_units for status in context.workers.statuses))
    return [status.done_units[unit] for status in context.workers.statuses]
