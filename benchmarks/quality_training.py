"""One training of ``benchmarks.quality`` and its score: ``python -m benchmarks.quality_training SPEC.json OUT.json``.

It computes on the first card that it sees, else on the processor. Steps, cache and scores are those of jobs on devices
(:class:`benchmarks.engine_job.EngineJob`).
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine_job import EngineJob
from benchmarks.measure import write_results
from coordinator.jobs.scoring import RowVerdict, ScoreReport
from edge_node.transport.base import Peer
from plutino.errors import NumericsError
from plutino.job.spec import JobSpec

_POSITIVE = "1"
"""The class whose F1 counts where a task has this class and one more."""


def main() -> None:
    """Train as the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("spec", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    spec = JobSpec.model_validate_json(options.spec.read_text(encoding="utf-8"))
    write_results(options.out, train(spec))


def train(spec: JobSpec) -> Mapping[str, Any]:
    """All steps, then loss and score of the held-out rows."""
    started_s, used_s = time.monotonic(), time.process_time()
    threads = spec.placement.threads or 1
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with (
        tempfile.TemporaryDirectory(prefix="quality-") as folder,
        EngineJob(spec, threads=threads, device=device, cache_dir=Path(folder)) as job,
    ):
        problem = ""
        try:
            job.train()
        except NumericsError as error:  # a rate so high that the loss is not finite any more
            problem = str(error)
        trained_s = time.monotonic() - started_s
        figures: dict[str, Any] = {"score": 0.0, "metrics": {}, "eval_loss": math.inf}
        if not problem:
            report = job.score()
            metrics = metrics_of(report)
            figures = {"score": headline(metrics), "metrics": metrics, "eval_loss": job.evaluate()}
        method = job.pipeline.executors[Peer(0)].method
        return {
            **figures,
            "num_steps": len(job.losses),
            "first_loss": job.losses[0] if job.losses else None,
            "last_loss": job.losses[-1] if job.losses else None,
            "problem": problem,
            "trained": sum(parameter.uses[0][1].numel() for parameter in method.parameters),
            "device": device.type if device.type == "cpu" else torch.cuda.get_device_name(),
            "train_s": trained_s,
            "processor_s": time.process_time() - used_s,
        }


def metrics_of(report: ScoreReport) -> dict[str, float]:
    """What was measured, with F1 of the positive class where there is one and one other (Dolan and Brockett 2005)."""
    metrics = {name: float(value) for name, value in report.score.values.items() if not math.isnan(value)}
    verdicts = next(iter(report.rows.values()), ())
    if report.score.metric == "classes" and {verdict.answer for verdict in verdicts} <= {"0", _POSITIVE}:
        metrics["f1"] = positive_f1(verdicts)
    return metrics


def positive_f1(verdicts: Sequence[RowVerdict]) -> float:
    """F1 of the positive class of two."""
    found = [verdict.is_right for verdict in verdicts if verdict.answer == _POSITIVE]
    missed = sum(not verdict.is_right for verdict in verdicts if verdict.answer != _POSITIVE)
    right = sum(found)
    return 2 * right / (len(found) + right + missed) if right else 0.0


def headline(metrics: Mapping[str, float]) -> float:
    """The number of a task as GLUE reports it: means of two where it has two measures."""
    if "f1" in metrics:
        return (metrics["f1"] + metrics["accuracy"]) / 2
    if "pearson" in metrics:
        return (metrics["pearson"] + metrics["spearman"]) / 2
    return metrics["accuracy"] if "accuracy" in metrics else metrics["exact_match"]


if __name__ == "__main__":
    main()
