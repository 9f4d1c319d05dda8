"""Feeding units of work to the workers and collecting what comes of them."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Literal

from coordinator.jobs.context import JobContext
from coordinator.jobs.runner import PreparedData, ScoreReport
from coordinator.scheduling.problem import stage_shapes
from plutino.errors import ConfigError
from plutino.job.assignment import StageShape
from plutino.types import Unit, UnitKind, WorkerRef
from plutino.wire.channel import Lane
from plutino.wire.convert import unit_to_proto
from protos import runners_pb2 as runner_pb
from protos import workers_pb2 as pb

PROBE_ROWS = 8
"""Training rows on which the published adapter's loss is compared with the pipeline's."""


@dataclass(frozen=True, slots=True)
class Batch:
    """A unit's rows as the runner gave them."""

    parts: tuple[runner_pb.BatchPart, ...]

    @property
    def loss_weight(self) -> float:
        """Label tokens of the whole unit."""
        return self.parts[0].loss_weight

    @property
    def num_tokens(self) -> int:
        """Tokens without padding."""
        return sum(sum(part.rows.lengths) for part in self.parts)

    @property
    def sample_indices(self) -> tuple[int, ...]:
        """Rows of the data set, in the order they are fed."""
        return tuple(index for part in self.parts for index in part.sample_indices)


async def train_batch(context: JobContext, step: int) -> Batch:
    """The rows of a training step."""
    ask = runner_pb.GetTrainBatch(step=step, micro_batch_size=context.numerics.micro_batch_size)
    return _batch(await context.runner.ask(runner_pb.RunnerCommand(get_train_batch=ask)))


def feed(
    context: JobContext,
    unit: Unit,
    batch: Batch,
    generate: pb.GenerateOptions | None = None,
    *,
    without_adapter: bool = False,
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


async def evaluation_loss(
    context: JobContext,
    *,
    num_rows: int,
    source: Literal["held-out", "training", "general"] = "held-out",
    use_adapter: bool = True,
) -> tuple[float, float]:
    """Sum of token losses over the first rows of a set, and the number of label tokens."""
    loss_sum, label_tokens = 0.0, 0.0
    # At least the probe's rows, so that it is one unit and cut in one way.
    batch_rows = max(context.spec.training.batch_size, PROBE_ROWS)
    for start_row in range(0, num_rows, batch_rows):
        ask = runner_pb.GetEvalBatch(
            start_row=start_row,
            num_rows=min(batch_rows, num_rows - start_row),
            micro_batch_size=context.numerics.micro_batch_size,
            from_training=source == "training",
            general=source == "general",
        )
        batch = _batch(await context.runner.ask(runner_pb.RunnerCommand(get_eval_batch=ask)))
        unit = await context.new_unit(UnitKind.EVALUATE)
        async with _running(context, unit):
            feed(context, unit, batch, without_adapter=not use_adapter)
            loss_sum += sum(done.loss_sum for done in await _all_done(context, unit))
        label_tokens += batch.loss_weight
    return loss_sum, label_tokens


async def probe_batch(context: JobContext, prepared: PreparedData) -> Batch:
    """The training rows that the published adapter is verified on, cut as :func:`evaluation_loss` cuts them."""
    ask = runner_pb.GetEvalBatch(
        start_row=0,
        num_rows=min(PROBE_ROWS, prepared.num_train),
        micro_batch_size=context.numerics.micro_batch_size,
        from_training=True,
    )
    return _batch(await context.runner.ask(runner_pb.RunnerCommand(get_eval_batch=ask)))


async def score(
    context: JobContext, prepared: PreparedData, *, use_adapter: bool, few_shot: bool = False
) -> tuple[ScoreReport, float]:
    """Generate answers to all held-out prompts and compare them; gives the seconds that generating took, too."""
    scoring = context.spec.scoring
    assert scoring is not None, "scoring is asked for by the spec"
    started_s = time.monotonic()
    num_groups = len(context.plan.stages)
    rows: dict[int, list[int]] = {}
    for start_row in range(0, prepared.num_eval, num_groups * scoring.batch_rows):
        ask = runner_pb.GetPrompts(
            start_row=start_row, num_groups=num_groups, group_rows=scoring.batch_rows, few_shot=few_shot
        )
        batch = _batch(await context.runner.ask(runner_pb.RunnerCommand(get_prompts=ask)))
        options = pb.GenerateOptions(
            max_new_tokens=scoring.max_new_tokens,
            temperature=scoring.temperature,
            stop_tokens=prepared.stop_token_ids,
            use_adapter=use_adapter,
            step=context.record.next_step,
        )
        unit = await context.new_unit(UnitKind.GENERATE)
        async with _running(context, unit):
            feed(context, unit, batch, options)
            for done in await _all_done(context, unit):
                rows |= {row.row: list(row.tokens) for row in done.rows}
    rows_json = json.dumps(rows)
    answer = await context.runner.ask(runner_pb.RunnerCommand(score=runner_pb.Score(rows_json=rows_json)))
    return ScoreReport.model_validate_json(answer[-1].scored.json), time.monotonic() - started_s


def _batch(events: Sequence[runner_pb.RunnerEvent]) -> Batch:
    return Batch(tuple(event.batch_part for event in events))


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
