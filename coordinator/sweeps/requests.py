"""Rows or prompts that each name an adapter, as an evaluation: jobs that train nothing, over one base model.

Entry points: :func:`read_requests` and :func:`evaluation_of`. Requests are sorted by adapter, so that each adapter's
rows are one range of one file: every job reads the same file and needs the same plan, on stages that stay loaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plutino.data.formats import BadRowError
from plutino.data.records import open_records
from plutino.errors import ConfigError, DataError
from plutino.hub_id import model_folder
from plutino.job.adapted_base import AdaptedBase, read_base
from plutino.job.adapter_method import SEQ2SEQ, method_of_adapter, read_adapter_config
from plutino.job.method import LoraConfig, MethodConfig
from plutino.job.overrides import apply_overrides
from plutino.job.spec import parse_spec
from plutino.sweep import SweepSpec, Trial

BASE = "base"
"""What the base model alone is called among adapters."""
ADAPTER_COLUMN = "adapter"
PERPLEXITY = "perplexity"
"""The metric for which nothing is generated."""

_NO_ANSWER = "-"
"""Stands where a prompt has no true answer: rows are read with one, and what is generated does not depend on it."""
_ANSWERS = {"prompt": "completion", "instruction": "output"}
_NAMED_LINES = 5
_RECORD_FILE = "plutino.json"


@dataclass(frozen=True, slots=True)
class Request:
    """One row to answer."""

    position: int
    """Among all requests as they were handed in, from 0."""
    adapter: str
    values: Mapping[str, Any]
    has_truth: bool


@dataclass(frozen=True, slots=True)
class NamedAdapter:
    """An adapter that requests may name."""

    name: str
    folder: Path
    model: Mapping[str, Any] | None = None
    """The job file's ``model`` of the job that trained it; None: only its files are known."""


def read_requests(path: Path, adapters: Iterable[str]) -> list[Request]:
    """Rows of a file, sorted by the adapter that their column ``adapter`` names; without one, the base model's.

    Args:
        path: rows as jobs have them, or prompts without answers.
        adapters: names that are known.

    Raises:
        DataError: the file cannot be read or is empty.
        ConfigError: rows name an adapter that is not known.
    """
    records, known = open_records(path), [BASE, *adapters]
    requests: list[Request] = []
    unknown: dict[str, list[int]] = {}
    for place in records.places():
        try:
            values = dict(records.read(place.position))
        except BadRowError as error:
            raise DataError(f"{path}, line {place.line_number}: {error}") from error
        name = values.pop(ADAPTER_COLUMN, None) or BASE
        if name not in known:
            unknown.setdefault(str(name), []).append(place.line_number)
        has_truth = _complete(values)
        requests.append(Request(len(requests), name, values, has_truth))
    if unknown:
        lines = "; ".join(
            f"{name!r} in line {', '.join(map(str, at[:_NAMED_LINES]))}{' ...' if len(at) > _NAMED_LINES else ''}"
            for name, at in sorted(unknown.items())
        )
        raise ConfigError(
            f"{path} names adapters that are not known: {lines}; known are {', '.join(known)}: give the others with "
            "--adapter NAME=JOB|FOLDER, or correct the rows"
        )
    if not requests:
        raise DataError(f"{path} has no rows; there is nothing to answer")
    return sorted(requests, key=lambda request: (known.index(request.adapter), request.position))


def evaluation_of(
    requests: Sequence[Request],
    rows_file: Path,
    adapters: Mapping[str, NamedAdapter],
    *,
    model: str | None,
    metric: str,
    max_new_tokens: int,
    overrides: Iterable[str] = (),
) -> SweepSpec:
    """The jobs that answer requests: one for each adapter that is named, in the requests' order.

    Args:
        requests: as :func:`read_requests` gives them.
        rows_file: where :func:`write_rows` put them.
        adapters: by name.
        model: the base model; None: the one that the adapters were trained on.
        metric: exact_match or json_slots, which compare answers with true ones; or perplexity, of the true ones.
        max_new_tokens: of each answer.
        overrides: settings of the jobs, as in a job file.

    Raises:
        ConfigError: adapters belong to other base models, or cannot be used; or rows lack the answers that the metric
            is about.
    """
    ranges = _ranges(requests)
    used = [adapters[name] for name in ranges if name != BASE]
    model_part = {"path": model} if model is not None else _common_model(used)
    base = _adapted_base(model_part, overrides)
    objective = _objective_of(used, base)
    trials = []
    for name, (first, end) in ranges.items():
        folder = None if name == BASE else adapters[name].folder
        # LoRA begins as the base model, to the bit.
        method: MethodConfig = LoraConfig(rank=1)
        if folder is not None:
            method = method_of_adapter(read_adapter_config(folder), str(folder), base)
        has_truths = all(request.has_truth for request in requests[first:end])
        if metric == PERPLEXITY and not has_truths:
            raise ConfigError(
                f"perplexity is of true answers, which rows of {name} lack; give them, or another --metric"
            )
        values = {
            "name": f"evaluate-{name}"[:80],
            "model": model_part,
            "objective": {"type": objective},
            "method": method.model_dump(mode="json"),
            "data": {"train": str(rows_file), "eval": str(rows_file)},
            "scoring": {
                "metric": metric if has_truths else "exact_match",
                "max_new_tokens": max_new_tokens,
                "before": False,
                "rows": [first, end],
                "keep_answers": True,
            },
            "evaluation": {"measure_general": "never"},
            "training": {
                "steps": 0,
                "batch_size": 1,
                "init_adapter": None if folder is None else str(folder),
            },
            "output": {"publish": False},
        }
        values = apply_overrides(values, overrides, path_keys=("model.path",), base_dir=Path.cwd())
        spec = parse_spec(values, base_dir=Path.cwd())
        if folder is not None:
            _check_base(name, folder, spec.model.path)
        trials.append(Trial(settings={ADAPTER_COLUMN: name}, spec=spec))
    return SweepSpec(name="evaluate", trials=tuple(trials), trains=False)


def write_rows(requests: Sequence[Request], path: Path) -> None:
    """The requests' rows, in their order, as a file that jobs read."""
    lines = (json.dumps(request.values, ensure_ascii=False) + "\n" for request in requests)
    path.write_text("".join(lines), encoding="utf-8")


def _complete(values: dict[str, Any]) -> bool:
    """Give a prompt an answer's place; whether it had one."""
    messages = values.get("messages")
    if isinstance(messages, list):
        if any(isinstance(message, dict) and message.get("role") == "assistant" for message in messages):
            return True
        values["messages"] = [*messages, {"role": "assistant", "content": _NO_ANSWER}]
        return False
    for question, answer in _ANSWERS.items():
        if question in values and values.get(answer) in (None, ""):
            values[answer] = _NO_ANSWER
            return False
    return True


def _ranges(requests: Sequence[Request]) -> dict[str, tuple[int, int]]:
    """Name of each adapter -> its rows, half open."""
    ranges: dict[str, tuple[int, int]] = {}
    for index, request in enumerate(requests):
        ranges[request.adapter] = (ranges.get(request.adapter, (index, 0))[0], index + 1)
    return ranges


def _common_model(adapters: Sequence[NamedAdapter]) -> Mapping[str, Any]:
    found: dict[str, Mapping[str, Any]] = {}
    for adapter in adapters:
        own = adapter.model or {"path": read_adapter_config(adapter.folder).get("base_model_name_or_path")}
        if own.get("path"):
            found.setdefault(str(own["path"]), own)
    if len(found) != 1:
        told = f"the adapters name {len(found)}: {', '.join(found)}" if found else "no adapter names one"
        raise ConfigError(f"which base model? {told}; say it with --model")
    return next(iter(found.values()))


def _adapted_base(model_part: Mapping[str, Any], overrides: Iterable[str]) -> AdaptedBase | None:
    chosen = apply_overrides({"model": model_part}, overrides, path_keys=("model.path",), base_dir=Path.cwd())["model"]
    path = chosen.get("path") if isinstance(chosen, Mapping) else chosen
    return read_base(model_folder(str(path)))


def _objective_of(used: Iterable[NamedAdapter], base: AdaptedBase | None) -> str:
    """What the base model does; where it is not on this machine yet, what its adapters were trained for."""
    if base is not None:
        return "seq2seq" if base.writes_what_it_read else "sft"
    tasks = {task for one in used if (task := read_adapter_config(one.folder).get("task_type")) is not None}
    if len(tasks) > 1:
        raise ConfigError(
            f"the adapters are for {' and '.join(sorted(tasks))}, which no model does both; ask one by one"
        )
    return "seq2seq" if tasks == {SEQ2SEQ} else "sft"


def _check_base(name: str, folder: Path, model: str) -> None:
    """Refuse an adapter whose record names another base.

    Raises:
        ConfigError: it does.
    """
    from plutino.manifest import base_model_hash

    record = folder / _RECORD_FILE
    if not record.is_file():
        return  # stock peft's: names and shapes are checked when it is loaded
    expected = str(json.loads(record.read_bytes()).get("base_hash"))
    found = base_model_hash(model_folder(model))
    if expected != found:
        raise ConfigError(
            f"the adapter {name} was trained on a base model with hash {expected[:12]}, {model} has {found[:12]}; "
            "evaluate it over its own base"
        )
