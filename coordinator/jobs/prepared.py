"""What a job's runner tells of its rows, as the coordinator keeps it."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from plutino.job.objective_part import MetricName
from plutino.job.spec import JobSpec


class TaskRows(BaseModel):
    """Where a task's held-out rows lie among those of all tasks, and how they are scored."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: str
    start_row: int
    end_row: int
    metric: MetricName


class SourceFile(BaseModel):
    """A file of rows, as the card names it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    use: str
    """training or held-out, with the task's name where there are several."""
    name: str
    """Without its folder."""
    sha256: str
    num_rows: int


class PreparedData(BaseModel):
    """What the coordinator needs to know of a job's rows to plan and to run it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    num_train: int
    num_eval: int
    """Held-out rows of the tasks that are trained: those count for the evaluation loss."""
    num_truncated: int
    total_steps: int
    row_tokens: int
    """Tokens of the longest training or held-out row."""
    source_tokens: int = 0
    """Tokens of the longest part of a row that carries no loss; 0: not known."""
    label_tokens_per_row: int
    """Most label tokens in one sequence, as a mean over both of a pair."""
    prompt_tokens: int
    """Tokens of the longest held-out prompt; 0 without held-out rows."""
    stop_token_ids: tuple[int, ...]
    mean_row_tokens: float
    num_general: int = 0
    """Windows of general text to measure on; 0: not asked for."""
    general_sha256: str = ""
    files: tuple[SourceFile, ...] = ()
    method_text_ids: tuple[int, ...] = ()
    """Tokens of the text that the method starts from."""
    class_names: tuple[str, ...] = ()
    """Of a classification: the classes in the order of the head's outputs."""
    tasks: tuple[TaskRows, ...] = ()
    """Tasks that have held-out rows; those that are trained come first."""
    num_probe: int = 0
    """Training rows that the published adapter may be verified on."""


def for_devices(spec: JobSpec, prepared: PreparedData) -> JobSpec:
    """The job's spec with what only the data and the tokenizer tell: a text's tokens, the classes."""
    changes: dict[str, Any] = {}
    if spec.method.text:
        changes["method"] = spec.method.with_text_ids(prepared.method_text_ids)
    if prepared.class_names:
        changes["objective"] = spec.objective.with_class_names(prepared.class_names)
    return spec.model_copy(update=changes)
