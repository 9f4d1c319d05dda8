"""What the job learns from, and how it is scored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator

from plutino.job.base import SpecPart
from plutino.job.objective_part import MetricName

FormatName = Literal[
    "auto", "prompt_completion", "messages", "sharegpt", "alpaca", "preference", "rated", "labelled", "text"
]


class RowsConfig(SpecPart):
    """Training and held-out rows: jsonl, csv, tsv, txt, parquet, or a folder of Hugging Face datasets."""

    train: str | None = None
    """Training rows. A relative path is taken from the job file's folder."""
    eval: str | None = None
    """Held-out rows; needed by eval_every, keep_best, early_stopping and scoring."""
    format: FormatName = "auto"
    """auto recognises the rows by their columns."""
    columns: dict[str, str] = Field(default_factory=dict)
    """The format's name of a column -> the file's, or a template with the file's columns in braces:
    ``{prompt: "Which intent? {text}", completion: intent}``."""
    limit: int | None = Field(None, ge=1)
    """Use only the first so many training rows; None means all."""
    eval_limit: int | None = Field(None, ge=1)
    """Use only the first so many held-out rows; None means all."""


class TaskConfig(RowsConfig):
    """One of several data sets of a job."""

    name: str = Field(min_length=1, max_length=40)
    weight: float = Field(1.0, gt=0)
    """Its share of the training rows is in proportion to weight * rows ** (1 / mixing_temperature)."""
    metric: MetricName | None = None
    """How its held-out rows are scored; None: as scoring.metric says."""

    @model_validator(mode="after")
    def _has_rows(self) -> TaskConfig:
        if self.train is None and self.eval is None:
            raise ValueError("a task needs train, or eval to be scored alone, or both")
        return self


class DataConfig(RowsConfig):
    """The rows of a job: one data set, or several tasks."""

    tasks: tuple[TaskConfig, ...] = ()
    """Several data sets in place of train and eval. One without train is only scored."""
    mixing_temperature: float = Field(1.0, gt=0)
    """1 draws from tasks by their rows; the higher, the more alike their shares (Raffel et al. 2020,
    arXiv:1910.10683)."""
    max_tokens: int = Field(512, ge=2)
    """Rows longer than this are cut at the end; a row that keeps no answer token is an error."""
    packing: bool = False
    """Several training rows share a sequence of max_tokens without seeing each other."""

    @model_validator(mode="after")
    def _one_kind_of_rows(self) -> DataConfig:
        if not self.tasks:
            if self.train is None:
                raise ValueError("give train, or tasks")
            return self
        alone = [
            name
            for name, field in RowsConfig.model_fields.items()
            if getattr(self, name) != field.get_default(call_default_factory=True)
        ]
        if alone:
            raise ValueError(f"{', '.join(alone)} belong to each of the tasks here; move them there")
        if not any(task.train for task in self.tasks):
            raise ValueError("no task has train: there is nothing to learn from")
        names = [task.name for task in self.tasks]
        if len(set(names)) != len(names):
            raise ValueError("two tasks have one name; rename one")
        return self

    @property
    def sources(self) -> Sequence[TaskConfig]:
        """The tasks, those with training rows first; a single data set is a task without a meaningful name."""
        if not self.tasks:
            own = {name: getattr(self, name) for name in RowsConfig.model_fields}
            return (TaskConfig(name="rows", **own),)
        return sorted(self.tasks, key=lambda task: task.train is None)

    @property
    def has_eval(self) -> bool:
        """Whether a task that is trained has held-out rows: those count for the evaluation loss."""
        return any(task.eval is not None for task in self.sources if task.train is not None)


class ScoringConfig(SpecPart):
    """Score the held-out rows, before and after."""

    metric: MetricName | Literal["auto"] = "auto"
    """auto takes the objective's own. exact_match: share of generated answers equal but for outer white space.
    json_slots: generated JSON that is valid, its intent, slot F1. perplexity: of the label tokens. The others belong to
    one objective each: classes (accuracy, F1), correlation, pairs (chosen above rejected), ratings."""
    max_new_tokens: int = Field(32, ge=1)
    before: bool = True
    """Score the base model too, before the first step."""
    after: bool = True
    """Score the trained model, at the end."""
    batch_rows: int = Field(16, ge=1)
    """Rows generated together in one group."""
    few_shot: int = Field(0, ge=0, le=64)
    """Score the base model with so many training rows as examples in its prompt, too; 0: not."""
    temperature: float = Field(0.0, ge=0)
    """0 is greedy; otherwise sampling, seeded by (job, step, sample, position)."""
    rows: tuple[int, int] | None = None
    """Score only held-out rows of this half-open range, counted from 0; None: all. For a single data set."""
    keep_answers: bool = False
    """Report the answers to all scored rows in place of the first few."""

    @model_validator(mode="after")
    def _rows_are_a_range(self) -> ScoringConfig:
        if self.rows is not None and not 0 <= self.rows[0] < self.rows[1]:
            raise ValueError(f"rows: {list(self.rows)} is no range; give the first row and the one after the last")
        return self
