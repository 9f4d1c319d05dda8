"""A job's heavy work on the coordinator's side: rows, batches, scores, export.

:class:`JobRunner` is plain synchronous code without state that matters: every answer is a function of the job's files
and of the question, so a runner that dies is simply started again. Where it runs (a Ray actor, a thread) is not its
business; :mod:`coordinator.jobs.runner_stream` connects it.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from coordinator.artifacts.assemble import AssembledAdapter, AssembleRequest, assemble_adapter
from coordinator.artifacts.assemble_model import assemble_model
from coordinator.artifacts.publish import PublishedAdapter, PublishRequest, publish_adapter
from coordinator.artifacts.verify_process import VerifyReport, VerifyRequest, run_verify_process
from coordinator.jobs.scoring import Score, score
from coordinator.jobs.value_scores import score_values
from plutino.assets import GENERAL_TEXT
from plutino.data.batches import (
    MicroBatchRows,
    StepBatch,
    batch_indices,
    cut_micro_batches,
    first_epoch_micro_batches,
    gather_step,
    prompt_micro_batch,
    repeated_micro_batches,
    total_steps,
)
from plutino.data.few_shot import with_examples
from plutino.data.general_text import GeneralText, read_general_text
from plutino.data.mixture import Mixture, make_mixture, mixture_indices
from plutino.data.packing import pack
from plutino.data.readers import Rows, read_rows
from plutino.data.samples import Batchable, JoinedSamples, Samples
from plutino.data.tokenisation import ModelTokenizer, class_names_of, load_tokenizer, sorted_class_names, tokenise
from plutino.errors import ConfigError, DataError
from plutino.hub_id import model_folder
from plutino.job.data import TaskConfig
from plutino.job.objective import GENERATED_METRICS, ClassificationConfig, MetricName
from plutino.job.spec import JobSpec
from plutino.security.tls import Credentials
from plutino.wire.bulk import BulkClient


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


class ScoredSample(BaseModel):
    """One held-out row as people see it."""

    model_config = ConfigDict(frozen=True)

    prompt: str
    answer: str
    truth: str


class ScoreReport(BaseModel):
    """A score and the first rows behind it."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    score: Score
    """Of the first task."""
    samples: tuple[ScoredSample, ...]
    by_task: dict[str, Score] = Field(default_factory=dict)
    """Of all tasks, where there are several."""

    @property
    def num_rows(self) -> int:
        """Held-out rows of all tasks."""
        return sum(one.num_rows for one in self.by_task.values()) if self.by_task else self.score.num_rows

    @property
    def values(self) -> dict[str, float]:
        """Everything that was measured, by name, with the task's before it where there are several."""
        if not self.by_task:
            return self.score.values
        return {f"{task} {name}": value for task, one in self.by_task.items() for name, value in one.values.items()}


@dataclass(frozen=True, slots=True)
class _RowSet:
    rows: Rows
    samples: Samples


@dataclass(frozen=True, slots=True)
class _Task:
    source: TaskConfig
    train: _RowSet | None
    held_out: _RowSet | None


_SHOWN_SAMPLES = 5

Verify = Callable[[VerifyRequest], VerifyReport]
"""How an assembled adapter is verified: in a process of its own, because that imports torch."""


class JobRunner:
    """Answers the coordinator's questions about one job."""

    def __init__(
        self,
        spec: JobSpec,
        bulk_address: str,
        verify: Verify = run_verify_process,
        credentials: Credentials | None = None,
    ) -> None:
        self._credentials = credentials
        self._spec = spec
        self._bulk_address = bulk_address
        self._verify = verify

    def prepare(self) -> PreparedData:
        """Read and tokenise all rows.

        Raises:
            DataError, ModelError: with the lines or files at fault.
        """
        training = self._spec.training
        sets = self._sets
        num_train = len(self._train)
        return PreparedData(
            num_train=num_train,
            num_eval=sum(len(task.held_out.samples) for task in self._tasks if task.train and task.held_out),
            num_truncated=sum(one.num_truncated for one in sets),
            total_steps=total_steps(num_train, training.batch_size, epochs=training.epochs, steps=training.steps),
            row_tokens=self._row_tokens,
            label_tokens_per_row=self._label_tokens_per_row,
            prompt_tokens=max((int(one.prompt_tokens.max()) for one in self._prompted), default=0),
            num_general=0 if self._general is None else len(self._general.samples),
            general_sha256="" if self._general is None else self._general.sha256,
            stop_token_ids=self._tokenizer.stop_token_ids,
            mean_row_tokens=float(self._train.lengths.mean()),
            files=self._files(),
            method_text_ids=self._method_text_ids(),
            class_names=self._class_names,
            tasks=self._task_rows(),
            num_probe=len(self._unpacked_train),
        )

    def _files(self) -> tuple[SourceFile, ...]:
        files = []
        for task in self._tasks:
            of_task = f" of {task.source.name}" if self._spec.data.tasks else ""
            for use, one in (("training", task.train), ("held-out", task.held_out)):
                if one is not None:
                    rows = one.rows
                    files.append(
                        SourceFile(use=use + of_task, name=rows.path.name, sha256=rows.sha256, num_rows=len(rows))
                    )
        return tuple(files)

    def _task_rows(self) -> tuple[TaskRows, ...]:
        found: list[TaskRows] = []
        for task in self._tasks:
            if task.held_out is not None:
                start = found[-1].end_row if found else 0
                end = start + len(task.held_out.samples)
                metric = self._spec.metric_of(task.source)
                found.append(TaskRows(name=task.source.name, start_row=start, end_row=end, metric=metric))
        return tuple(found)

    def _method_text_ids(self) -> tuple[int, ...]:
        text = self._spec.method.text
        return tuple(self._tokenizer.encode([text])[0].ids) if text else ()

    def train_batch(self, step: int, micro_batch_size: int) -> StepBatch:
        """Rows of a training step; a micro-batch has at most so many sequences."""
        training = self._spec.training
        num_samples = self._samples_of(micro_batch_size)
        if training.activation_cache != "off":
            first_epoch = self._first_epoch(num_samples)
            rows = repeated_micro_batches(first_epoch, step, training.batch_size, num_samples, training.seed)
            return gather_step(self._train, rows)
        if self._mixture is None:
            indices = batch_indices(step, training.batch_size, len(self._train), training.seed)
        else:
            indices = mixture_indices(step, training.batch_size, self._mixture, training.seed)
        return cut_micro_batches(self._train, indices, num_samples)

    @functools.lru_cache(maxsize=1)  # noqa: B019 - a runner lives as long as its process
    def _first_epoch(self, micro_batch_size: int) -> tuple[tuple[int, ...], ...]:
        training = self._spec.training
        return first_epoch_micro_batches(self._train, training.batch_size, micro_batch_size, training.seed)

    def eval_batch(
        self, start_row: int, num_rows: int, micro_batch_size: int, *, from_training: bool, general: bool = False
    ) -> StepBatch:
        """Rows of one evaluation unit, in order and never packed: held-out or training ones, or general text."""
        samples = self._unpacked_train if from_training else self._general_samples if general else self._held_out
        indices = range(start_row, min(start_row + num_rows, len(samples)))
        return cut_micro_batches(samples, indices, self._samples_of(micro_batch_size))

    def _samples_of(self, micro_batch_size: int) -> int:
        return max(1, micro_batch_size // self._spec.objective.sequences_per_row)

    def prompts(
        self,
        start_row: int,
        num_groups: int,
        group_rows: int,
        end_row: int | None = None,
        *,
        few_shot: bool = False,
    ) -> list[MicroBatchRows]:
        """Prompts of one generation unit, cut into groups; none at or after ``end_row``.

        With ``few_shot``, examples stand before each.
        """
        samples: Batchable | None = self._few_shot if few_shot else self._held_out
        assert samples is not None, "few-shot prompts are asked for by the spec"
        last = min(start_row + num_groups * group_rows, len(samples) if end_row is None else end_row)
        return [
            prompt_micro_batch(samples, range(first, min(first + group_rows, last)))
            for first in range(start_row, last, group_rows)
        ]

    def score(self, rows: Mapping[int, list[float]], perplexities: Mapping[str, float]) -> ScoreReport:
        """Compare what came of held-out rows with what they say.

        Args:
            rows: held-out row -> generated tokens, or what the objective says of it (both answers of a pair).
            perplexities: of tasks that are scored by them, by name.
        """
        scores: dict[str, Score] = {}
        shown: list[ScoredSample] = []
        for task in self._task_rows():
            held_out = next(one.held_out for one in self._tasks if one.source.name == task.name)
            assert held_out is not None, "only tasks with held-out rows are listed"
            own = {row - task.start_row: values for row, values in rows.items() if task.start_row <= row < task.end_row}
            if task.metric == "perplexity":
                num_rows = task.end_row - task.start_row
                scores[task.name] = Score(metric=task.metric, num_rows=num_rows, perplexity=perplexities[task.name])
            elif task.metric in GENERATED_METRICS:
                scores[task.name], samples = self._score_answers(task.metric, held_out, own)
                shown += samples
            else:
                labels = held_out.samples.labels
                true = [] if labels is None else [float(labels[row]) for row in sorted(own)]
                scores[task.name] = score_values(task.metric, [own[row] for row in sorted(own)], true)
        by_task = scores if self._spec.data.tasks else {}
        return ScoreReport(score=next(iter(scores.values())), samples=tuple(shown[:_SHOWN_SAMPLES]), by_task=by_task)

    def _score_answers(
        self, metric: MetricName, held_out: _RowSet, rows: Mapping[int, list[float]]
    ) -> tuple[Score, list[ScoredSample]]:
        indices = sorted(rows)
        answers = [self._tokenizer.decode(int(token) for token in rows[index]) for index in indices]
        truth_rows = [held_out.rows.rows[index] for index in indices]
        truths = [row.answer for row in truth_rows]
        samples = [
            ScoredSample(prompt=row.question, answer=answer, truth=row.answer)
            for row, answer in list(zip(truth_rows, answers, strict=True))[:_SHOWN_SAMPLES]
        ]
        return score(metric, answers, truths), samples

    def assemble(self, request: AssembleRequest) -> AssembledAdapter:
        """Join the stages' parts into one verified, staged adapter."""
        assemble = assemble_model if self._spec.method.trains_weights else assemble_adapter
        return assemble(request, self._spec, BulkClient(self._bulk_address, self._credentials), verify=self._verify)

    def publish(self, request: PublishRequest) -> PublishedAdapter:
        """Make the staged adapter visible, whole, with its card."""
        return publish_adapter(request)

    @functools.cached_property
    def _tokenizer(self) -> ModelTokenizer:
        return load_tokenizer(model_folder(self._spec.model.path))

    @functools.cached_property
    def _tasks(self) -> tuple[_Task, ...]:
        return tuple(
            _Task(
                source,
                None if source.train is None else self._read(source, source.train, source.limit),
                None if source.eval is None else self._read(source, source.eval, source.eval_limit),
            )
            for source in self._spec.data.sources
        )

    @functools.cached_property
    def _class_names(self) -> tuple[str, ...]:
        objective = self._spec.objective
        if not isinstance(objective, ClassificationConfig):
            return ()
        if objective.labels:
            return objective.labels
        names: set[str] = set()
        for source in self._spec.data.sources:
            if source.train is not None:
                names |= set(class_names_of(self._rows(source, source.train, source.limit)))
        return sorted_class_names(names)

    @property
    def _sets(self) -> list[Samples]:
        return [one.samples for task in self._tasks for one in (task.train, task.held_out) if one is not None]

    @functools.cached_property
    def _row_tokens(self) -> int:
        return max(int(self._train.lengths.max()), *(int(one.lengths.max()) for one in self._sets))

    @functools.cached_property
    def _label_tokens_per_row(self) -> int:
        return max(
            self._spec.data.max_tokens if self._spec.data.packing else 1,
            *(-(-one.most_labels // one.sequences_per_sample) for one in self._sets),
        )

    @property
    def _prompted(self) -> list[Samples]:
        """Rows whose prompts may be answered."""
        return [*self._held_out_parts, *([] if self._few_shot is None else [self._few_shot])]

    @functools.cached_property
    def _few_shot(self) -> Samples | None:
        spec = self._spec
        if spec.scoring is None or not spec.scoring.few_shot:
            return None
        task = self._tasks[0]
        if spec.data.tasks or not spec.generates or task.train is None or task.held_out is None:
            raise ConfigError(
                "scoring.few_shot answers the held-out rows of one data set with examples of its training rows; leave "
                "it out for several tasks, and where no answers are generated"
            )
        rows = with_examples(
            task.held_out.rows,
            task.train.rows,
            num_examples=spec.scoring.few_shot,
            seed=spec.training.seed,
            is_chat=self._tokenizer.template is not None,
        )
        samples = tokenise(rows, self._tokenizer, max_tokens=sys.maxsize)
        longest = int(samples.prompt_tokens.max())
        if longest > spec.data.max_tokens:
            raise ConfigError(
                f"the longest prompt with scoring.few_shot: {spec.scoring.few_shot} examples has {longest} tokens, "
                f"data.max_tokens is {spec.data.max_tokens}; raise it, or take fewer examples"
            )
        return samples

    @functools.cached_property
    def _general(self) -> GeneralText | None:
        spec = self._spec
        evaluation = spec.evaluation
        is_language_model = spec.objective.counted == "label tokens"
        if evaluation.measure_general == "never" or (evaluation.measure_general == "auto" and spec.scoring is None):
            return None
        if not is_language_model:
            if evaluation.measure_general == "always":
                raise ConfigError(
                    f"evaluation.measure_general: always, but with objective.type: {spec.objective.type} no text can "
                    "be measured; set it to never"
                )
            return None
        path = GENERAL_TEXT if evaluation.general is None else Path(evaluation.general)
        return read_general_text(
            path, self._tokenizer, row_tokens=self._row_tokens, label_tokens=self._label_tokens_per_row
        )

    @property
    def _general_samples(self) -> Samples:
        assert self._general is not None, "the coordinator knows from prepare that there is no general text"
        return self._general.samples

    @functools.cached_property
    def _unpacked_train(self) -> Batchable:
        return _joined([task.train.samples for task in self._tasks if task.train is not None])

    @functools.cached_property
    def _train(self) -> Batchable:
        data = self._spec.data
        if not data.packing:
            return self._unpacked_train
        return _joined([pack(task.train.samples, data.max_tokens) for task in self._tasks if task.train is not None])

    @functools.cached_property
    def _mixture(self) -> Mixture | None:
        """How tasks take turns; None: there is one."""
        train = self._train
        if not isinstance(train, JoinedSamples):
            return None
        weights = [task.source.weight for task in self._tasks if task.train is not None]
        return make_mixture([len(part) for part in train.parts], weights, self._spec.data.mixing_temperature)

    @property
    def _held_out_parts(self) -> list[Samples]:
        return [task.held_out.samples for task in self._tasks if task.held_out is not None]

    @functools.cached_property
    def _held_out(self) -> Batchable:
        if not self._held_out_parts:
            raise DataError("this needs held-out rows: set data.eval")
        return _joined(self._held_out_parts)

    def _rows(self, source: TaskConfig, path: str, limit: int | None) -> Rows:
        return read_rows(Path(path), source.format, limit, columns=source.columns)

    def _read(self, source: TaskConfig, path: str, limit: int | None) -> _RowSet:
        rows, objective = self._rows(source, path, limit), self._spec.objective
        samples = tokenise(
            rows,
            self._tokenizer,
            max_tokens=self._spec.data.max_tokens,
            train_on=objective.labelled_tokens,
            use=objective.row_use,
            counted=objective.counted,
            class_names=self._class_names,
        )
        return _RowSet(rows, samples)


def for_devices(spec: JobSpec, prepared: PreparedData) -> JobSpec:
    """The job's spec with what only the data and the tokenizer tell: a text's tokens, the classes."""
    changes: dict[str, Any] = {}
    if spec.method.text:
        changes["method"] = spec.method.with_text_ids(prepared.method_text_ids)
    if prepared.class_names:
        changes["objective"] = spec.objective.with_class_names(prepared.class_names)
    return spec.model_copy(update=changes)


def _joined(parts: Sequence[Batchable]) -> Batchable:
    return parts[0] if len(parts) == 1 else JoinedSamples(parts)


def rows_from_json(text: str) -> dict[int, list[float]]:
    """Generated tokens, or the objective's values, by held-out row."""
    return {int(row): tokens for row, tokens in json.loads(text).items()}
