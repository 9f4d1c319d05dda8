"""What every method reaches and costs: ``python -m benchmarks.methods --workers 30 --threads 1 --out DIR``.

One table a model and task, over SNIPS intents and SNIPS as JSON. Each row of it: four learning rates are tried on
intents kept back from training, the one of the least loss there is trained with three seeds on all rows of a task, and
each time the held-out rows are answered. Beside it the same trainings in one process of transformers + peft, for the
methods that it has. Trainings are processes of their own, so many at a time; what lies in DIR already is not trained
again. The first seed of every row comes before the second of any.

``--data DIR`` may hold a further model (``models/tiny-llama-28m``). ``--quick`` shows soon that all of it runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import machine_facts, write_results
from benchmarks.method_rows import ROWS, TASKS, Cell
from benchmarks.searched import Searched
from coordinator.jobs.trained import trained_share
from plutino.assets import SNIPS_DIR, TINY_LLAMA_DIR
from plutino.job.spec import JobSpec, parse_spec

SEEDS = (0, 1, 2)
SEARCHED_TASK = "intent"
"""Whose learning rates serve every task: a search on JSON rows takes four times as long."""
_KEPT_BACK_ROWS = 200


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=int, default=2, help="trainings at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads of each")
    parser.add_argument("--out", type=Path, required=True, help="folder of results; what is there is not run again")
    parser.add_argument("--data", type=Path, help="folder with further models: models/tiny-llama-28m")
    parser.add_argument("--only", default="", help="tables, such as tiny-llama-7m/intent,tiny-llama-28m/intent")
    parser.add_argument("--rows", default="", help="rows, separated by semicolons; empty: all")
    parser.add_argument("--quick", action="store_true", help="three steps, one rate, one seed, few rows")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    return Tables(options).run()


class Tables(Searched):
    """All trainings of a call, and the tables that come of them."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options.out, num_at_a_time=options.workers, threads=options.threads, table_file="methods.md")
        self._options = options
        self._models = {TINY_LLAMA_DIR.name: TINY_LLAMA_DIR}
        larger = None if options.data is None else options.data / "models" / "tiny-llama-28m"
        if larger is not None and larger.is_dir():
            self._models[larger.name] = larger.resolve()
        tables = [(model, task) for model, task in ((m, t) for m in self._models for t in TASKS)]
        if "tiny-llama-28m" in self._models:
            # Last, because it takes longest: JSON with the larger model.
            tables.sort(key=lambda table: table == ("tiny-llama-28m", "json"))
        wanted = set(filter(None, options.only.split(",")))
        self._tables = [table for table in tables if not wanted or "/".join(table) in wanted]
        named = [name.strip() for name in options.rows.split(";") if name.strip()]
        self.rows = {name: ROWS[name] for name in named} if named else dict(ROWS)
        self.seeds = SEEDS[:1] if options.quick else SEEDS
        self._kept_back = self._write_kept_back()

    # ---- what is trained ----

    @property
    def num_groups(self) -> int:
        """See :class:`benchmarks.searched.Searched`."""
        return len(self._tables)

    def searches(self, group: int) -> Iterable[Cell]:
        """See :class:`benchmarks.searched.Searched`."""
        for name, row in self.rows.items():
            for rate in row.rates[1:2] if self._options.quick else row.rates:
                yield Cell(group, 0, self._tables[group][0], SEARCHED_TASK, name, "plutino", "search", rate, 0)

    def finals(self, group: int, name: str, rate: float) -> Iterable[Cell]:
        """See :class:`benchmarks.searched.Searched`."""
        for system in ("plutino", "peft") if self.rows[name].has_peft else ("plutino",):
            for seed in self.seeds:
                yield Cell(group, 1 + seed, *self._tables[group], name, system, "final", rate, seed)

    def command(self, cell: Cell) -> Sequence[str]:
        """See :class:`benchmarks.searched.Searched`."""
        return ("benchmarks.method_training", cell.system, cell.part)

    def badness(self, figures: Mapping[str, Any]) -> float:
        """The loss on what was kept back."""
        return float(figures["eval_loss"])

    def spec(self, cell: Cell) -> JobSpec:
        """See :class:`benchmarks.searched.Searched`."""
        row, task, is_quick = self.rows[cell.row], TASKS[cell.task], self._options.quick
        train, held_out = (SNIPS_DIR / f"{name}{task.suffix}.jsonl" for name in ("train", "validation"))
        if cell.part == "search":
            train, held_out = self._kept_back
        method = dict(row.method)
        if "unfreeze" in method and cell.task == "json":
            method["unfreeze"] = {"every_steps": 12, "blocks": 1}
        # Stock peft counts positions over the padding before a row; one row at a time has none.
        alone = cell.system == "peft" and row.num_virtual_tokens > 0
        return parse_spec(
            {
                "name": "methods",
                "model": {"path": str(self._models[cell.model]), "dtype": "fp32", "quantization": row.quantization},
                "method": method,
                "data": {"train": str(train), "eval": str(held_out)} | ({"eval_limit": 8} if is_quick else {}),
                "scoring": {
                    "metric": task.metric,
                    "max_new_tokens": task.max_new_tokens,
                    "before": False,
                    "batch_rows": 1 if alone else 40,
                },
                "evaluation": {"measure_general": "never"},
                "training": {
                    "steps": 3 if is_quick else task.steps,
                    "batch_size": 16,
                    "micro_batch_size": 16,
                    "lr": cell.rate,
                    "warmup_steps": 5,
                    "seed": cell.seed,
                    "checkpointing": "off",
                },
                "placement": {"threads": self._options.threads},
            },
            base_dir=self._out,
        )

    def _write_kept_back(self) -> tuple[Path, Path]:
        """The training rows but the last, and the last ones: learning rates are chosen without the held-out rows."""
        lines = (SNIPS_DIR / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        pair = (self._out / "search_train.jsonl", self._out / "search_held_out.jsonl")
        pair[0].write_text("".join(lines[:-_KEPT_BACK_ROWS]), encoding="utf-8")
        pair[1].write_text("".join(lines[-_KEPT_BACK_ROWS:]), encoding="utf-8")
        return pair

    # ---- what came of it ----

    def write(self) -> None:
        """The tables as far as they have come, for people and as JSON."""
        texts, tables = [], {}
        for group, (model, task) in enumerate(self._tables):
            found = {name: self._entry(group, name) for name in self.rows}
            tables[f"{model}/{task}"] = {name: entry for name, entry in found.items() if entry is not None}
            texts.append(table_text(model, task, tables[f"{model}/{task}"]))
        (self._out / "methods.md").write_text("\n".join(texts), encoding="utf-8")
        machine = machine_facts(("torch", "transformers", "peft"))
        facts = {"machine": machine, "threads": self._options.threads, "tables": tables, "failed": self.failed}
        write_results(self._out / "methods.json", facts)

    def _entry(self, group: int, name: str) -> dict[str, Any] | None:
        rate = self.best_rate(group, name)
        if rate is None:
            return None
        searches = [cell for cell in self.searches(group) if cell.row == name]
        finals = list(self.finals(group, name, rate))
        spec = self.spec(finals[0])
        runs = {
            system: [figures for cell in finals if cell.system == system and (figures := self.read(cell)) is not None]
            for system in ("plutino", "peft")
        }
        return {
            "method": json.loads(spec.method.model_dump_json()),
            "quantization": spec.model.quantization,
            "steps": spec.training.steps,
            "searched": {f"{cell.rate:g}": (self.read(cell) or {}).get("eval_loss") for cell in searches},
            "lr": rate,
            "is_at_the_edge": len(searches) > 1 and rate in (searches[0].rate, searches[-1].rate),
            "cacheable": spec.method.leaves_blocks_alone,
            "trained_share": trained_share(spec)[1],
            "runs": runs,
        }


def table_text(model: str, task: str, entries: Mapping[str, Mapping[str, Any]]) -> str:
    """A table in Markdown; means over the seeds, and their largest distance from it."""
    lines = [
        f"### {model}, {task}",
        "",
        "| method | lr | trained | plutino | transformers + peft | peak MiB, plutino | peft | tokens/s, plutino | peft "
        "| cached |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, entry in entries.items():
        ours, theirs = entry["runs"]["plutino"], entry["runs"]["peft"]
        lines.append(
            f"| {name} | {entry['lr']:g}{' (edge)' if entry['is_at_the_edge'] else ''} | {entry['trained_share']:.2%} "
            f"| {_spread(ours)} | {_spread(theirs)} | {_median(ours, 'peak_mib')} | {_median(theirs, 'peak_mib')} "
            f"| {_median(ours, 'tokens_per_s')} | {_median(theirs, 'tokens_per_s')} "
            f"| {'yes' if entry['cacheable'] else 'no'} |"
        )
    return "\n".join([*lines, ""])


def _spread(runs: Sequence[Mapping[str, Any]]) -> str:
    if not runs:
        return "-"
    scores = [run["score"] for run in runs]
    mean = statistics.fmean(scores)
    return f"{mean:.1%} ± {max(abs(score - mean) for score in scores):.1%} ({len(runs)})"


def _median(runs: Sequence[Mapping[str, Any]], name: str) -> str:
    return f"{statistics.median(run[name] for run in runs):.0f}" if runs else "-"


if __name__ == "__main__":
    sys.exit(main())
