"""Jobs on tiny models through InProcessPipeline, with the coordinator's own barrier deciding each step."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coordinator.jobs.barrier import Abort, Commit, Vote, decide, open_barrier
from edge_node.engine.reference import InProcessPipeline
from edge_node.engine.unit import StepOutcome
from edge_node.stage.passes import StageInput
from edge_node.stage.weights import LocalSource
from edge_node.transport.base import Peer
from plutino.data.batches import MicroBatchRows
from plutino.job.assignment import StageShape
from plutino.job.data import DataConfig
from plutino.job.method import LoraConfig
from plutino.job.model import ModelConfig
from plutino.job.spec import JobSpec
from plutino.job.training import TrainingConfig
from plutino.types import JobId, Unit, WorkerRef

TOTAL_STEPS = 6
# Wrapping layers is most of these tests' time.
TARGETS = {"llama": ("q_proj", "down_proj"), "tied_llama": ("q_proj", "down_proj"), "gpt2": ("c_attn", "mlp.c_proj")}
CUTS: dict[int, tuple[int, ...]] = {1: (0, 4), 2: (0, 1, 4), 3: (0, 1, 3, 4), 4: (0, 1, 2, 3, 4)}
"""Block borders by number of stages; unequal on purpose."""


@dataclass(frozen=True)
class Batch:
    rows: list[MicroBatchRows]

    @property
    def loss_weight(self) -> float:
        return float(sum(rows.label_mask.sum() for rows in self.rows))


def make_rows(seed: int, num_rows: int = 2, *, has_labels: bool = True, num_tokens: int = 9) -> MicroBatchRows:
    """One micro-batch of random rows of unequal lengths; the last third of each carries loss."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(4, num_tokens + 1, num_rows).astype(np.int32)
    lengths[0] = num_tokens
    masks = [np.arange(length) >= (length - length // 3 if has_labels else length) for length in lengths]
    return MicroBatchRows(
        lengths=lengths,
        input_ids=generator.integers(2, 61, int(lengths.sum())).astype(np.int32),
        label_mask=np.concatenate(masks).astype(np.uint8),
        padded_tokens=num_tokens,
        sample_indices=tuple(range(10 * seed, 10 * seed + num_rows)),
    )


def make_batches(num_steps: int = 2, num_micro_batches: int = 4) -> list[Batch]:
    """A few steps; the last one has one micro-batch fewer, and that one fewer rows."""
    batches = [Batch([make_rows(10 * step + m) for m in range(num_micro_batches)]) for step in range(num_steps - 1)]
    last = [make_rows(10 * num_steps + m) for m in range(num_micro_batches - 2)]
    return [*batches, Batch([*last, make_rows(999, num_rows=1)])]


def stages_of(
    num_stages: int, replicas: Sequence[int] = (), tables: Sequence[tuple[int, ...]] = ()
) -> list[StageShape]:
    return [
        StageShape(
            start_block=start,
            end_block=end,
            num_replicas=replicas[i] if replicas else 1,
            micro_batch_owner=tables[i] if tables else (),
        )
        for i, (start, end) in enumerate(pairwise(CUTS[num_stages]))
    ]


def make_spec(model_dir: Path, *, training: dict[str, Any] | None = None, **method: Any) -> JobSpec:
    name = model_dir.name.rstrip("0123456789")
    values = {"rank": 4, "target_modules": TARGETS.get(name, "all-linear")} | method
    return JobSpec(
        model=ModelConfig(path=str(model_dir)),
        method=LoraConfig(**values),
        data=DataConfig(train="train.jsonl"),
        training=TrainingConfig(**({"steps": TOTAL_STEPS, "lr": 1e-2, "seed": 3} | (training or {}))),
    )


@contextmanager
def pipeline_of(spec: JobSpec, stages: Sequence[StageShape], **options: Any) -> Iterator[InProcessPipeline]:
    # The source is read while the stages are built, so that one for all of them will do.
    source = LocalSource(Path(spec.model.path))
    with InProcessPipeline(lambda: source, spec, stages, total_steps=TOTAL_STEPS, **options) as pipeline:
        yield pipeline


def decide_step(
    pipeline: InProcessPipeline,
    step: int,
    loss_weight: float,
    outcomes: dict[Peer, StepOutcome],
    max_norm: float | None,
) -> Commit | Abort:
    """What the coordinator would decide on these votes."""
    refs = {me: WorkerRef(JobId("job"), 1, me.stage_index, me.replica_index) for me in outcomes}
    barrier = open_barrier(step=step, workers=refs.values(), loss_weight=loss_weight)
    for me, outcome in outcomes.items():
        names = [parameter.name for parameter in pipeline.executors[me].method.parameters]
        vote = Vote(
            worker=refs[me],
            step=step,
            squared_norms=dict(zip(names, outcome.squared_norms, strict=True)),
            finite=outcome.is_finite,
            loss_sum=outcome.loss_sum,
            reason=outcome.reason,
        )
        barrier = barrier.add_vote(vote)
    decision = decide(barrier, max_norm)
    assert decision is not None
    return decision


def run_step(pipeline: InProcessPipeline, step: int, batch: Batch, max_norm: float | None = 1.0) -> Commit | Abort:
    outcomes = pipeline.train_step(step, batch.rows, batch.loss_weight)
    decision = decide_step(pipeline, step, batch.loss_weight, outcomes, max_norm)
    if isinstance(decision, Commit):
        pipeline.commit(step, decision.clip_scale)
    else:
        pipeline.drop()
    return decision


def train(pipeline: InProcessPipeline, batches: Sequence[Batch], first_step: int = 0) -> list[Commit | Abort]:
    """The decisions carry losses, norms and clip scales, so equal ones mean equal bits of all three."""
    return [run_step(pipeline, step, batch) for step, batch in enumerate(batches, first_step)]


def assert_same_tensors(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different, f"{len(different)} of {len(left)} differ, first {different[0]}"


def padded(rows: MicroBatchRows) -> tuple[Tensor, Tensor, Tensor]:
    """input_ids, labels (-100: no loss) and attention mask, right-padded, as transformers wants them."""
    shape = (len(rows.lengths), rows.padded_tokens)
    ids, labels, mask = (
        torch.zeros(shape, dtype=torch.long),
        torch.full(shape, -100),
        torch.zeros(shape, dtype=torch.long),
    )
    start = 0
    for row, length in enumerate(rows.lengths.tolist()):
        own = torch.from_numpy(rows.input_ids[start : start + length]).long()
        carries = torch.from_numpy(rows.label_mask[start : start + length]).bool()
        ids[row, :length], mask[row, :length] = own, 1
        labels[row, :length] = torch.where(carries, own, -100)
        start += length
    return ids, labels, mask


def cancel_at_call(pipeline: InProcessPipeline, me: Peer, unit: Unit, *, call: int) -> None:
    """Cancel a unit from within a stage's n-th forward pass."""
    stage = pipeline.executors[me].stage
    forward, calls = stage.forward, itertools.count(1)

    def cancelling(inputs: StageInput) -> Tensor:
        if next(calls) == call:
            pipeline.cancel(unit)
        return forward(inputs)

    stage.forward = cancelling
