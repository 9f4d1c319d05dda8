"""What a scheme costs in quality: the demo's task trained on weights held in each, at several seeds.

    python -m benchmarks.quantize_accuracy --workers 12 --threads 1 --out DIR
    python -m benchmarks.quantize_accuracy --quick     # does it run at all

Every trial is one process with the stages' own engine in it (``edge_node/engine/reference.py``): the demo's rows, LoRA,
learning rate and steps, then greedy answers to the held-out rows. Told beside the score: processor seconds, which other
processes hardly move, and the bytes that the frozen weights take. Figures are written after every trial, and trials
that a file holds already are not run again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.goals import Goal, goal_table
from benchmarks.measure import RESULTS_DIR, machine_facts, write_results
from coordinator.demo.job import Task, job_values
from coordinator.jobs.barrier import clip_scale, total_norm
from coordinator.jobs.scoring import score
from edge_node.engine.generate import GenerateOptions
from edge_node.engine.reference import InProcessPipeline
from edge_node.stage.build import COMPUTE_DTYPES
from edge_node.stage.weights import LocalSource
from plutino.assets import TINY_LLAMA_DIR
from plutino.data.batches import batch_indices, cut_micro_batches, prompt_micro_batch, sequential_indices
from plutino.data.readers import read_rows
from plutino.data.tokenisation import tokenise
from plutino.data.tokenizer import load_tokenizer
from plutino.errors import QuantizationError
from plutino.job.assignment import StageShape
from plutino.job.model import Scheme, packing_of
from plutino.job.spec import JobSpec, parse_spec

SCHEMES: tuple[Scheme, ...] = ("none", "int8", "nf4", "int4")
HELD_TO_GOAL: tuple[Scheme, ...] = ("int8", "nf4")
MOST_LOST_POINTS = 2.0
"""Percentage points of exact answers (of slot F1, --task json), in the mean over seeds."""
FURTHER_MODELS = ("tiny-llama-28m",)
"""Folders of ``--data`` that are trained too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One training."""

    model_dir: str
    scheme: Scheme
    seed: int
    task: Task
    num_steps: int | None
    """None: the demo's."""
    num_eval_rows: int | None
    """None: all."""
    num_threads: int

    @property
    def key(self) -> str:
        """Name in the file of figures."""
        return f"{Path(self.model_dir).name} {self.scheme} seed {self.seed}"


def main(arguments: list[str] | None = None) -> int:
    """Command line; gives the process's exit status."""
    options = _parser().parse_args(arguments)
    path: Path = options.out / "quantize_accuracy.json"
    models = [TINY_LLAMA_DIR]
    if options.data is not None:
        models += [options.data / name for name in FURTHER_MODELS if (options.data / name / "config.json").is_file()]
    trials = [
        Trial(
            model_dir=str(model_dir),
            scheme=scheme,
            seed=seed,
            task=options.task,
            num_steps=3 if options.quick else None,
            num_eval_rows=16 if options.quick else None,
            num_threads=options.threads,
        )
        for model_dir in models
        for seed in range(1 if options.quick else options.seeds)
        for scheme in options.schemes
    ]
    settings = {"task": options.task, "threads": options.threads, "quick": options.quick}
    done = _known(path, settings)
    open_trials = [trial for trial in trials if trial.key not in done]
    machine = machine_facts(("torch", "transformers", "peft", "bitsandbytes"))
    # A fresh interpreter a process: threads of torch do not survive a fork.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, mp_context=spawn) as pool:
        for finished in as_completed([pool.submit(run_trial, trial) for trial in open_trials]):
            key, figures = finished.result()
            done[key] = figures
            told = figures.get("refused") or f"{figures['score']:.1%}, {figures['train_cpu_s']:.1f} s"
            print(f"{key}: {told}", file=sys.stderr, flush=True)
            write_results(path, {"machine": machine, "settings": settings, "trials": dict(sorted(done.items()))})
    names = [Path(model).name for model in models]
    print(table(done, names))
    if not options.quick:
        goals = accuracy_goals(done, names)
        if goals:  # else nothing was trained beside unquantised weights
            print(goal_table(goals))
        document = {"machine": machine, "settings": settings, "trials": dict(sorted(done.items()))}
        write_results(path, {**document, "goals": [goal.to_dict() for goal in goals]})
    print(f"written to {path}", file=sys.stderr)
    return 0


def run_trial(trial: Trial) -> tuple[str, dict[str, object]]:
    """Train and score; gives the trial's key and its figures."""
    torch.set_num_threads(trial.num_threads)
    with tempfile.TemporaryDirectory() as folder:
        values = job_values(trial.task, adapter_dir=Path(folder), seed=trial.seed, is_fast=False)
        values["model"] = {"path": trial.model_dir, "dtype": "fp32", "quantization": trial.scheme}
        if trial.num_steps is not None:
            values["training"]["steps"] = trial.num_steps
        if trial.num_eval_rows is not None:
            values["data"]["eval_limit"] = trial.num_eval_rows
        spec = parse_spec(values, base_dir=Path(folder))
    source = LocalSource(Path(trial.model_dir))
    whole = [StageShape(start_block=0, end_block=int(source.config()["num_hidden_layers"]))]
    facts = {**asdict(trial), "model_dir": Path(trial.model_dir).name}
    try:
        pipeline = InProcessPipeline(
            lambda: source,
            spec,
            whole,
            total_steps=spec.training.steps or 0,
            dtype=COMPUTE_DTYPES[spec.model.dtype],
            threads=trial.num_threads,
            packing=packing_of(spec.model, trial.scheme),
        )
    except QuantizationError as error:
        return trial.key, {**facts, "refused": str(error)}
    with pipeline:
        (executor,) = pipeline.executors.values()
        model = executor.stage.model
        adapters = {id(use) for parameter in executor.method.parameters for _, use in parameter.uses}
        held = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers()) if id(t) not in adapters}
        losses, train_s, train_cpu_s = _train(spec, pipeline)
        task_score, score_cpu_s = _score(spec, pipeline)
    return trial.key, {
        **facts,
        "score": task_score,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "train_s": train_s,
        "train_cpu_s": train_cpu_s,
        "score_cpu_s": score_cpu_s,
        "frozen_bytes": sum(held.values()),
    }


def _train(spec: JobSpec, pipeline: InProcessPipeline) -> tuple[list[float], float, float]:
    """Losses by step, and wall and processor seconds of all of them."""
    assert spec.data.train is not None
    tokenizer = load_tokenizer(Path(spec.model.path))
    samples = tokenise(read_rows(Path(spec.data.train)), tokenizer, max_tokens=spec.data.max_tokens)
    started_s, started_cpu_s = time.monotonic(), time.process_time()
    losses = []
    for step in range(spec.training.steps or 0):
        indices = batch_indices(step, spec.training.batch_size, len(samples), spec.training.seed)
        batch = cut_micro_batches(samples, indices, spec.training.micro_batch_size or spec.training.batch_size)
        (outcome,) = pipeline.train_step(step, batch.micro_batches, batch.loss_weight).values()
        (executor,) = pipeline.executors.values()
        names = [parameter.name for parameter in executor.method.parameters]
        norm = total_norm(dict(zip(names, outcome.squared_norms, strict=True)))
        pipeline.commit(step, clip_scale(norm, spec.training.max_grad_norm))
        losses.append(outcome.loss_sum / batch.loss_weight)
    return losses, time.monotonic() - started_s, time.process_time() - started_cpu_s


def _score(spec: JobSpec, pipeline: InProcessPipeline) -> tuple[float, float]:
    """The task's score on the held-out rows (exact answers, or slot F1), and processor seconds of giving them."""
    scoring = spec.scoring
    assert scoring is not None and spec.data.eval is not None
    started_cpu_s = time.process_time()
    tokenizer = load_tokenizer(Path(spec.model.path))
    held_out = read_rows(Path(spec.data.eval), spec.data.format, spec.data.eval_limit)
    samples = tokenise(held_out, tokenizer, max_tokens=spec.data.max_tokens)
    options = GenerateOptions(scoring.max_new_tokens, tuple(tokenizer.stop_token_ids))
    groups = [
        prompt_micro_batch(samples, sequential_indices(group, scoring.batch_rows, len(samples)))
        for group in range(-(-len(samples) // scoring.batch_rows))
    ]
    answers = [tokenizer.decode(row) for rows in pipeline.generate(0, groups, options) for row in rows]
    result = score(spec.metric_of(spec.data.sources[0]), answers, [row.answer for row in held_out.rows])
    return result.headline, time.process_time() - started_cpu_s


def accuracy_goals(trials: Mapping[str, Mapping[str, object]], models: Sequence[str]) -> list[Goal]:
    """Points that int8 and nf4 lose against unquantised weights, in the mean over seeds."""
    goals = []
    for model in models:
        plain = _mean(trials, model, "none", "score")
        for scheme in HELD_TO_GOAL:
            found = _mean(trials, model, scheme, "score")
            if plain is not None and found is not None:
                name = f"{model}, {scheme}: points of the score lost"
                goals.append(Goal(name=name, measured=100 * (plain - found), at_most=MOST_LOST_POINTS))
    return goals


def table(trials: Mapping[str, Mapping[str, object]], models: Sequence[str]) -> str:
    """Plain text: a line a model and scheme, means over seeds, times as ratios to unquantised weights."""
    lines = [f"{'model':<18} {'scheme':<7} {'seeds':>5} {'score':>7} {'+-':>6} {'train':>6} {'answer':>6} {'MiB':>7}"]
    for model in models:
        plain_s = [_mean(trials, model, "none", what) for what in ("train_cpu_s", "score_cpu_s")]
        for scheme in SCHEMES:
            found = _values(trials, model, scheme, "score")
            if not found:
                continue
            spread = statistics.stdev(found) if len(found) > 1 else 0.0
            seconds = [_mean(trials, model, scheme, what) for what in ("train_cpu_s", "score_cpu_s")]
            ratios = [
                f"{one / plain:>5.2f}x" if one is not None and plain else f"{'-':>6}"
                for one, plain in zip(seconds, plain_s, strict=True)
            ]
            mib = (_mean(trials, model, scheme, "frozen_bytes") or 0) / 2**20
            lines.append(
                f"{model:<18} {scheme:<7} {len(found):>5} {statistics.mean(found):>7.2%} {spread:>6.2%} "
                f"{ratios[0]} {ratios[1]} {mib:>7.1f}"
            )
    return "\n".join(lines)


def _values(trials: Mapping[str, Mapping[str, object]], model: str, scheme: str, what: str) -> list[float]:
    wanted = (model, scheme)
    return [
        float(str(one[what]))
        for one in trials.values()
        if (one["model_dir"], one["scheme"]) == wanted and "refused" not in one
    ]


def _mean(trials: Mapping[str, Mapping[str, object]], model: str, scheme: str, what: str) -> float | None:
    found = _values(trials, model, scheme, what)
    return statistics.mean(found) if found else None


def _known(path: Path, settings: Mapping[str, object]) -> dict[str, dict[str, object]]:
    """Trials of a file that was written with the same settings."""
    if not path.is_file():
        return {}
    document = json.loads(path.read_text())
    return dict(document["trials"]) if document["settings"] == settings else {}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantize_accuracy", description=__doc__)
    parser.add_argument("--workers", type=int, default=1, help="trials at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each trial")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument("--task", choices=("intent", "json"), default="intent")
    parser.add_argument("--data", type=Path, help=f"folder with further models: {', '.join(FURTHER_MODELS)}")
    parser.add_argument("--quick", action="store_true", help="three steps of one seed, to see it run")
    parser.add_argument("--out", type=Path, default=RESULTS_DIR, help="folder for the figures")
    return parser


if __name__ == "__main__":
    sys.exit(main())
