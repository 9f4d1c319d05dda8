"""The job spec: what a person asks for, as one validated value.

Entry points: :func:`load_spec` (a YAML or JSON file) and :func:`parse_spec` (a mapping). Both raise ConfigError with
every problem at once and, for an unknown key, the nearest known one.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError, model_validator

from plutino.errors import ConfigError
from plutino.hub_id import parse_hub_id
from plutino.job.auto_method import spelled_out
from plutino.job.combinations import combination_problems
from plutino.job.method import LoraConfig
from plutino.job.objective import GrpoConfig, SftConfig
from plutino.job.overrides import apply_overrides
from plutino.job.parts import JobParts
from plutino.job.rewards import AdapterReward, FunctionReward, RewardSource
from plutino.yaml_text import read_yaml


class JobSpec(JobParts):
    """One fine-tuning job."""

    @model_validator(mode="before")
    @classmethod
    def _method_is_lora_and_objective_sft_by_default(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        values = spelled_out(values, LoraConfig().type)
        for part, default in (("method", LoraConfig().type), ("objective", SftConfig().type)):
            given = values.get(part)
            if isinstance(given, Mapping) and "type" not in given:
                values = {**values, part: {"type": default, **given}}
        return values

    @model_validator(mode="after")
    def _parts_go_together(self) -> JobSpec:
        if (problem := next(combination_problems(self), None)) is not None:
            raise ValueError(problem)
        return self


def load_spec(path: Path, overrides: Iterable[str] = ()) -> JobSpec:
    """Read a job file; relative paths in it are taken from its own folder.

    Args:
        path: a YAML or JSON file.
        overrides: settings that win over the file's, as :func:`plutino.job.overrides.apply_overrides` takes them;
            relative paths among them are taken from the current folder.

    Raises:
        ConfigError: the file is missing, is not YAML, or does not validate.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the job file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"the job file {path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    try:
        values = read_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping with the keys {', '.join(JobSpec.model_fields)}")
    values = apply_overrides(_spelled_out(values), overrides, path_keys=("model", *_PATH_KEYS), base_dir=Path.cwd())
    return parse_spec(values, base_dir=path.resolve().parent)


def parse_spec(values: Mapping[str, Any], *, base_dir: Path) -> JobSpec:
    """Validate a job spec and make its paths absolute.

    Raises:
        ConfigError: with one line per problem.
    """
    values = _spelled_out(values)
    try:
        spec = JobSpec.model_validate(values)
    except ValidationError as error:
        lines = _explain(values, error.errors(include_url=False))
        raise ConfigError("the job spec has problems:\n" + "\n".join(f"  {line}" for line in lines)) from error
    return _absolute(spec, base_dir)


def _spelled_out(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with ``model: PATH`` in its long form."""
    spelled_out = dict(values)
    if isinstance(spelled_out.get("model"), str):
        spelled_out["model"] = {"path": spelled_out["model"]}
    return spelled_out


# What transformers, trl and peft call our settings; no spelling distance would find them.
_NAMES_ELSEWHERE = {
    "learning_rate": "lr",
    "lr_scheduler_type": "lr_schedule",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "max_length": "max_tokens",
    "max_steps": "steps",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "micro_batch_size",
    "r": "rank",
}


def _explain(values: Mapping[str, Any], problems: Iterable[Mapping[str, Any]]) -> list[str]:
    """One line per place; the ways in which a value fits none of its allowed types are joined by "or"."""
    by_place: dict[str, list[Mapping[str, Any]]] = {}
    for problem in problems:
        by_place.setdefault(".".join(_written_place(values, problem)) or "the spec", []).append(problem)
    lines = []
    for place, there in by_place.items():
        whats = ", or ".join(dict.fromkeys(_what(problem) for problem in there))
        # The value tells nothing where a key is unknown or missing, or where several of them contradict each other.
        is_shown = there[0]["type"] not in ("extra_forbidden", "missing") and not isinstance(there[0]["input"], dict)
        lines.append(f"{place}: {whats}" + (f" (given: {reprlib.repr(there[0]['input'])})" if is_shown else ""))
    return lines


def _what(problem: Mapping[str, Any]) -> str:
    if problem["type"] == "extra_forbidden":
        known = _known_keys(problem["loc"][:-1])
        key = str(problem["loc"][-1])
        nearest = [name for name in (_NAMES_ELSEWHERE.get(key),) if name in known]
        nearest += difflib.get_close_matches(key, known, n=1, cutoff=0.6)
        return "unknown key; " + (f"did you mean {nearest[0]!r}?" if nearest else f"known keys: {', '.join(known)}")
    if problem["type"] == "missing":
        return "is required"
    return str(problem["msg"]).removeprefix("Value error, ")


def _written_place(values: Any, problem: Mapping[str, Any]) -> list[str]:
    """The keys that lead to a problem; pydantic also names the types it tried there, which nobody wrote."""
    place = []
    for part in problem["loc"]:
        is_key = isinstance(values, Mapping) and part in values
        if is_key or (isinstance(values, (list, tuple)) and part in range(len(values))):
            values = values[part]
        elif problem["type"] != "missing":
            continue
        place.append(str(part))
    return place


def _known_keys(loc: tuple[Any, ...]) -> list[str]:
    part: type[BaseModel] = JobSpec
    # The type that tells the members of a union apart follows the key in pydantic's places.
    for key, tag in zip_longest(loc, loc[1:]):
        field = part.model_fields.get(str(key))
        if field is None:
            continue
        candidates = (field.annotation, *get_args(field.annotation))
        parts = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        tagged = [c for c in parts if "type" in c.model_fields and c.model_fields["type"].default == tag]
        part = next(iter(tagged or parts), part)
    return list(part.model_fields)


_PATH_KEYS = ("model.path", "data.train", "data.eval", "evaluation.general", "training.init_adapter", "output.dir")


def _absolute(spec: JobSpec, base_dir: Path) -> JobSpec:
    parts: dict[str, Any] = {}
    for part_name, key in (path_key.split(".") for path_key in _PATH_KEYS):
        part = parts.get(part_name, getattr(spec, part_name))
        path = getattr(part, key)
        if part_name == "model" and parse_hub_id(path) is not None and not (base_dir / path).is_dir():
            continue  # a folder of that name wins over a model of the hub
        if path is not None:
            parts[part_name] = part.model_copy(update={key: str((base_dir / Path(path).expanduser()).resolve())})
    absolute = spec.model_copy(update=parts)
    if isinstance(absolute.objective, GrpoConfig):
        rewards = tuple(_absolute_reward(source, base_dir) for source in absolute.objective.rewards)
        absolute = absolute.model_copy(update={"objective": absolute.objective.model_copy(update={"rewards": rewards})})
    tasks = tuple(
        task.model_copy(
            update={
                key: str((base_dir / Path(path).expanduser()).resolve())
                for key in ("train", "eval")
                if (path := getattr(task, key)) is not None
            }
        )
        for task in spec.data.tasks
    )
    return absolute.model_copy(update={"data": absolute.data.model_copy(update={"tasks": tasks})})


def _absolute_reward(source: RewardSource, base_dir: Path) -> RewardSource:
    if isinstance(source, FunctionReward):
        path, _, name = source.function.rpartition(":")
        return source.model_copy(update={"function": f"{(base_dir / Path(path).expanduser()).resolve()}:{name}"})
    if isinstance(source, AdapterReward):
        return source.model_copy(update={"path": str((base_dir / Path(source.path).expanduser()).resolve())})
    return source
