"""The LLM2LLM loop (Lee et al. 2024, arXiv:2403.15042) as people hand it in and see it.

Rounds of: train from the base model, ask the trained model its own seed rows, let a teacher write rows like those that
it got wrong, train anew on all of them. New rows spring from seed rows alone, never from generated ones, so errors do
not drift from round to round; held-out rows take no part in it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from plutino.errors import ConfigError
from plutino.job.model import ModelConfig
from plutino.job.spec import JobSpec, load_spec
from plutino.yaml_text import read_yaml


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class RecordedTeacher(_Value):
    """Answers that were recorded before; nobody is asked."""

    type: Literal["recorded"] = "recorded"
    path: str
    """jsonl of {"row": the seed row, "reply": what was answered}; several lines of one row answer one after the
    other."""


class EndpointTeacher(_Value):
    """A server that speaks OpenAI's chat completions. What it is asked holds seed rows: they leave this machine."""

    type: Literal["endpoint"] = "endpoint"
    url: str
    """Up to and without /chat/completions: http://127.0.0.1:8000/v1."""
    model: str
    api_key_env: str | None = None
    """Name of the environment variable, in the coordinator's environment, that holds the key; it is never stored."""
    temperature: float = Field(1.0, ge=0)
    max_tokens: int = Field(512, ge=1)
    timeout_s: float = Field(60.0, gt=0)
    """Of one whole answer."""
    retries: int = Field(4, ge=0)
    """After timeouts, broken connections, 429 and 5xx, waiting longer each time."""
    concurrency: int = Field(4, ge=1, le=64)


class LocalModelTeacher(_Value):
    """A folder of transformers, run in a process of its own on the coordinator's machine."""

    type: Literal["local_model"] = "local_model"
    path: str
    dtype: Literal["fp32", "bf16"] = "fp32"
    temperature: float = Field(1.0, ge=0)
    max_new_tokens: int = Field(256, ge=1)
    time_limit_s: float = Field(600.0, gt=0)
    """Of all answers of one wave of questions."""
    seed: int = Field(0, ge=0)


class PipelineTeacher(_Value):
    """A larger model, split over the same devices as the job: nothing leaves them."""

    type: Literal["pipeline"] = "pipeline"
    model: ModelConfig
    temperature: float = Field(1.0, ge=0)
    max_new_tokens: int = Field(256, ge=1)
    max_tokens: int = Field(1024, ge=2)
    """Longer questions are cut."""


Teacher = Annotated[
    RecordedTeacher | EndpointTeacher | LocalModelTeacher | PipelineTeacher, Field(discriminator="type")
]


class LoopConfig(_Value):
    """How the loop goes, beside its job."""

    rounds: int = Field(3, ge=1, le=50)
    """Rounds of asking the teacher; one training more than that."""
    samples_per_wrong: int = Field(1, ge=1, le=32)
    """New rows for each seed row that the student got wrong."""
    asks: int = Field(2, ge=1, le=10)
    """A teacher whose answers leave some of these missing is asked so often about one row, in each round."""
    rouge_l: float = Field(0.95, gt=0, le=1)
    """A new row whose question is more alike (ROUGE-L F1) to a known one is a duplicate."""
    known_answers: bool = False
    """New rows must have an answer that some seed row has; always so for classification."""
    verify_votes: int = Field(0, ge=0, le=9)
    """Ask the teacher each new row's question so often, and keep the row if most answers are its own; 0: not."""
    instructions: str = ""
    """What the teacher is told beside the rules that it always gets."""
    teacher: Teacher


class LoopSpec(_Value):
    """A loop: the job of its rounds, whose training rows are the seed, and how it goes."""

    name: str
    job: JobSpec
    loop: LoopConfig


class RoundStatus(_Value):
    """One round, as far as it has come."""

    number: int
    num_rows: int = 0
    """Rows that its job trains on."""
    job_id: str | None = None
    state: str = "waiting"
    """Its job's state; asking while the teacher answers; done."""
    reason: str = ""
    seed_right: int | None = None
    """Seed rows that the trained student answers right."""
    num_seed: int = 0
    held_out: float | None = None
    """The scoring's headline on the job's held-out rows, if it has any."""
    held_out_rows: int = 0
    asked: int = 0
    """Questions that the teacher was asked."""
    failed: int = 0
    """Of these: no answer."""
    kept: int = 0
    """New rows for the next round."""
    rejected: dict[str, int] = Field(default_factory=dict)
    """Why answers gave no new row, and how often."""


class LoopStatus(_Value):
    """A loop, as far as it has come."""

    loop_id: str
    name: str
    state: str
    """running, succeeded, failed or cancelled."""
    reason: str = ""
    rounds: tuple[RoundStatus, ...]
    data_dir: str
    """Where the rows of each round lie: round-0.jsonl and so on."""
    adapter_job_id: str | None = None
    adapter_dir: str | None = None
    total_s: float = 0.0

    @property
    def has_ended(self) -> bool:
        """Nothing changes any more, unless it is resumed."""
        return self.state != "running"


class Sample(_Value):
    """What came of one answer of the teacher."""

    round: int
    seed_line: int
    """Line of the seed row in its file."""
    row: dict[str, Any] | None
    """As it would be trained on; None: the answer holds none."""
    kept: bool
    why: str
    """Why not; empty if it was kept."""


def load_loop(path: Path, overrides: Iterable[str] = ()) -> LoopSpec:
    """Read a loop file: ``job``, the path of a job file, beside the keys of :class:`LoopConfig`.

    Args:
        path: a YAML file; relative paths in it are taken from its own folder.
        overrides: settings of the job, as :func:`plutino.job.spec.load_spec` takes them.

    Raises:
        ConfigError: a file is missing or does not validate, or the job is none that a loop can run.
    """
    try:
        values = read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the loop file {path}: {error}") from error
    if not isinstance(values, dict) or not isinstance(values.get("job"), str):
        raise ConfigError(f"{path} must name its job file under job, beside {', '.join(LoopConfig.model_fields)}")
    folder = path.resolve().parent
    job = load_spec(folder / Path(values.pop("job")).expanduser(), overrides)
    name = str(values.pop("name", job.name))
    try:
        loop = LoopConfig.model_validate(values)
    except ValidationError as error:
        problems = [f"  {'.'.join(map(str, one['loc'])) or path.name}: {one['msg']}" for one in error.errors()]
        raise ConfigError(f"the loop file {path} has problems:\n" + "\n".join(problems)) from error
    loop = loop.model_copy(update={"teacher": _absolute(loop.teacher, folder)})
    return check_loop(LoopSpec(name=name, job=job, loop=loop))


def check_loop(spec: LoopSpec) -> LoopSpec:
    """Refuse a job that the loop cannot run; gives the spec.

    Raises:
        ConfigError: with what to change.
    """
    job = spec.job
    if job.data.tasks:
        raise ConfigError("a loop has one seed; give the job data.train in place of data.tasks")
    if job.training.keep_best or job.training.early_stopping is not None or job.training.eval_every is not None:
        raise ConfigError(
            "in a loop eval_every, keep_best and early_stopping would judge by the seed rows that the job trains on; "
            "leave them out"
        )
    metric = job.metric_of(job.data.sources[0])
    if metric not in ("exact_match", "json_slots", "classes"):
        raise ConfigError(
            f"a loop asks for rows that the student got wrong, which scoring.metric: {metric} does not tell; use "
            "exact_match, json_slots or objective.type: classification"
        )
    return spec


def _absolute(teacher: Teacher, folder: Path) -> Teacher:
    def found(path: str) -> str:
        return str((folder / Path(path).expanduser()).resolve())

    if isinstance(teacher, RecordedTeacher | LocalModelTeacher):
        return teacher.model_copy(update={"path": found(teacher.path)})
    if isinstance(teacher, PipelineTeacher) and (folder / teacher.model.path).is_dir():
        return teacher.model_copy(
            update={"model": teacher.model.model_copy(update={"path": found(teacher.model.path)})}
        )
    return teacher
