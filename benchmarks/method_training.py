"""One training of one method, by plutino's engine or by transformers + peft: a child of ``benchmarks.methods``.

``python -m benchmarks.method_training SYSTEM PART SPEC.json OUT.json`` trains in one process and writes what it
measured. The engine is one stage of :class:`edge_node.engine.reference.InProcessPipeline`, which gives the bits of any
partition; rows, batches and scores are the coordinator's.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from coordinator.demo.reference import run_reference
from coordinator.jobs.barrier import Commit, Vote, decide, open_barrier
from coordinator.jobs.prepared import PreparedData, for_devices
from coordinator.jobs.runner import JobRunner
from edge_node.engine.generate import GenerateOptions
from edge_node.engine.reference import InProcessPipeline
from edge_node.stage.weights import LocalSource
from edge_node.transport.base import Peer
from plutino.data.batches import MicroBatchRows
from plutino.job.assignment import StageShape
from plutino.job.model import packing_of
from plutino.job.spec import JobSpec
from plutino.types import JobId, WorkerRef

Part = Literal["search", "final"]
"""search: the loss on rows kept back from training is all that is asked for. final: held-out rows are answered."""

_EVAL_ROWS = 40
_WORKER = WorkerRef(JobId("training"), 1, 0, 0)


def main() -> None:
    """Train as the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("system", choices=("plutino", "peft"))
    parser.add_argument("part", choices=("search", "final"))
    parser.add_argument("spec", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    spec = JobSpec.model_validate_json(options.spec.read_text(encoding="utf-8"))
    torch.set_num_threads(spec.placement.threads or 1)
    train = train_with_plutino if options.system == "plutino" else train_with_peft
    figures = train(spec, options.part)
    unfinished = options.out.with_suffix(".tmp")
    unfinished.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(options.out)


def train_with_peft(spec: JobSpec, part: Part) -> dict[str, Any]:
    """The same job in plain transformers and peft."""
    used_s = time.process_time()
    result = run_reference(spec)
    assert result.after is not None, "the job asks for scores"
    return {
        "score": result.after.headline,
        "metrics": result.after.values,
        "losses": result.losses,
        "trained": result.trainable_parameters,
        # One thread computes all the time, so that the clock is its processor time unless others disturb it.
        "train_s": result.train_s,
        "tokens_per_s": result.train_tokens_per_s,
        "peak_mib": result.peak_rss_mib - result.baseline_rss_mib,
        "used_s": time.process_time() - used_s,
    }


def train_with_plutino(spec: JobSpec, part: Part) -> dict[str, Any]:
    """All steps, then the loss on held-out rows, and answers to them where they are scored."""
    baseline_mib, used_s = _peak_mib(), time.process_time()
    runner = JobRunner(spec, bulk_address="")
    prepared = runner.prepare()
    spec = for_devices(spec, prepared)
    source = LocalSource(Path(spec.model.path))
    num_blocks = int(json.loads((Path(spec.model.path) / "config.json").read_text())["num_hidden_layers"])
    assert spec.model.quantization != "auto", "a benchmark names its scheme"
    with InProcessPipeline(
        lambda: source,
        spec,
        (StageShape(start_block=0, end_block=num_blocks),),
        total_steps=prepared.total_steps,
        packing=packing_of(spec.model, spec.model.quantization),
        threads=spec.placement.threads or 1,
    ) as pipeline:
        started_s = time.monotonic()
        losses, num_tokens = _train(pipeline, runner, spec, prepared.total_steps)
        train_s = time.monotonic() - started_s
        peak_mib = _peak_mib() - baseline_mib
        figures = {
            "eval_loss": _eval_loss(pipeline, runner, spec, prepared),
            "losses": losses,
            "trained": sum(p.uses[0][1].numel() for p in pipeline.executors[Peer(0)].method.parameters),
            "train_s": train_s,
            "tokens_per_s": num_tokens / train_s,
            "peak_mib": peak_mib,
        }
        if part == "final":
            score = runner.score(_answers(pipeline, runner, spec, prepared), {}).score
            figures |= {"score": score.headline, "metrics": score.values}
    return {**figures, "used_s": time.process_time() - used_s}


def _train(pipeline: InProcessPipeline, runner: JobRunner, spec: JobSpec, num_steps: int) -> tuple[list[float], int]:
    """Mean loss of every step, and the tokens that were trained on, padding not counted."""
    losses, num_tokens = [], 0
    names = [parameter.name for parameter in pipeline.executors[Peer(0)].method.parameters]
    for step in range(num_steps):
        batch = runner.train_batch(step, spec.training.micro_batch_size or spec.training.batch_size)
        outcome = pipeline.train_step(step, batch.micro_batches, batch.loss_weight)[Peer(0)]
        barrier = open_barrier(step=step, workers=(_WORKER,), loss_weight=batch.loss_weight).add_vote(
            Vote(
                worker=_WORKER,
                step=step,
                squared_norms=dict(zip(names, outcome.squared_norms, strict=True)),
                finite=outcome.is_finite,
                loss_sum=outcome.loss_sum,
                reason=outcome.reason,
            )
        )
        decision = decide(barrier, spec.training.max_grad_norm)
        if isinstance(decision, Commit):
            pipeline.commit(step, decision.clip_scale)
            losses.append(decision.loss)
        else:  # a rate so high that the loss is not finite any more: the rest would be skipped too
            pipeline.drop()
            losses.append(math.inf)
        num_tokens += sum(int(rows.lengths.sum()) for rows in batch.micro_batches)
    return losses, num_tokens


def _eval_loss(pipeline: InProcessPipeline, runner: JobRunner, spec: JobSpec, prepared: PreparedData) -> float:
    loss_sum, loss_weight = 0.0, 0.0
    for serial, first in enumerate(range(0, prepared.num_eval, _EVAL_ROWS)):
        batch = runner.eval_batch(first, _EVAL_ROWS, spec.training.batch_size, from_training=False)
        loss_sum += pipeline.evaluate(serial, batch.micro_batches)
        loss_weight += batch.loss_weight
    return loss_sum / loss_weight


def _answers(
    pipeline: InProcessPipeline, runner: JobRunner, spec: JobSpec, prepared: PreparedData
) -> dict[int, list[float]]:
    """Greedy tokens by held-out row."""
    assert spec.scoring is not None, "a final training is scored"
    options = GenerateOptions(max_new_tokens=spec.scoring.max_new_tokens, stop_tokens=prepared.stop_token_ids)
    num_groups = -(-prepared.num_eval // spec.scoring.batch_rows)
    groups: Sequence[MicroBatchRows] = runner.prompts(0, num_groups, spec.scoring.batch_rows)
    answers: dict[int, list[float]] = {}
    for group, rows in zip(groups, pipeline.generate(0, groups, options), strict=True):
        answers |= {row: list(map(float, tokens)) for row, tokens in zip(group.sample_indices, rows, strict=True)}
    return answers


def _peak_mib() -> float:
    # Linux counts ru_maxrss in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
