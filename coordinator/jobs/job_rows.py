"""A job's rows: read, tokenised, packed and joined, each set once and only when somebody asks for it.

Everything here is a function of the spec and of the files that it names.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from coordinator.jobs.prepared import SourceFile, TaskRows
from plutino.assets import GENERAL_TEXT
from plutino.data.few_shot import with_examples
from plutino.data.general_text import GeneralText, read_general_text
from plutino.data.mixture import Mixture, make_mixture
from plutino.data.packing import pack
from plutino.data.readers import Row, Rows, read_rows
from plutino.data.samples import Batchable, JoinedSamples, Samples
from plutino.data.sequences import class_names_of, sorted_class_names
from plutino.data.tokenisation import Spread, tokenise
from plutino.data.tokenizer import ModelTokenizer, load_tokenizer
from plutino.errors import ConfigError, DataError
from plutino.hub_id import model_folder
from plutino.job.data import TaskConfig
from plutino.job.objective import ClassificationConfig
from plutino.job.spec import JobSpec


@dataclass(frozen=True, slots=True)
class RowSet:
    """One file's rows, as they are read and as tokens."""

    rows: Rows
    samples: Samples


@dataclass(frozen=True, slots=True)
class Task:
    """One data set of the job."""

    source: TaskConfig
    train: RowSet | None
    held_out: RowSet | None


class JobRows:
    """All rows that a job trains on, measures on or answers."""

    def __init__(self, spec: JobSpec, spread: Callable[[Path], Spread] | None = None) -> None:
        self._spec = spec
        self._spread = spread

    @functools.cached_property
    def tokenizer(self) -> ModelTokenizer:
        """The base model's."""
        return load_tokenizer(model_folder(self._spec.model.path))

    @functools.cached_property
    def tasks(self) -> tuple[Task, ...]:
        """All data sets, in the spec's order."""
        return tuple(
            Task(
                source,
                None if source.train is None else self._read(source, source.train, source.limit),
                None if source.eval is None else self._read(source, source.eval, source.eval_limit),
            )
            for source in self._spec.data.sources
        )

    @functools.cached_property
    def class_names(self) -> tuple[str, ...]:
        """Of a classification: the classes in the order of the head's outputs; empty otherwise."""
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
    def sets(self) -> list[Samples]:
        """Every file's samples."""
        return [one.samples for task in self.tasks for one in (task.train, task.held_out) if one is not None]

    @functools.cached_property
    def row_tokens(self) -> int:
        """Tokens of the longest row, sampled answers included."""
        own = max(int(self.train.lengths.max()), *(int(one.lengths.max()) for one in self.sets))
        sampled = self._spec.objective.generated_tokens
        return max(own, self._train_prompt_tokens + sampled) if sampled else own

    @functools.cached_property
    def source_tokens(self) -> int:
        """Tokens of the longest part of a row that carries no loss, which is what an encoder-decoder reads."""
        return max(one.most_unlabelled for one in self.sets)

    @functools.cached_property
    def label_tokens_per_row(self) -> int:
        """Most label tokens in one sequence, as a mean over both of a pair."""
        return max(
            self._spec.data.max_tokens if self._spec.data.packing else 1,
            self._spec.objective.generated_tokens,
            *(-(-one.most_labels // one.sequences_per_sample) for one in self.sets),
        )

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the longest prompt that may be answered; 0 if none is."""
        prompted = [*self._held_out_parts, *([] if self.few_shot is None else [self.few_shot])]
        own = max((int(one.prompt_tokens.max()) for one in prompted), default=0)
        return max(own, self._train_prompt_tokens) if self._spec.objective.generated_tokens else own

    @property
    def _train_prompt_tokens(self) -> int:
        return max(int(task.train.samples.prompt_tokens.max()) for task in self.tasks if task.train is not None)

    def train_row(self, index: int) -> Row:
        """What a training row that is not packed says."""
        for task in self.tasks:
            if task.train is None:
                continue
            if index < len(task.train.samples):
                return task.train.rows.rows[index]
            index -= len(task.train.samples)
        raise IndexError(index)

    @functools.cached_property
    def few_shot(self) -> Samples | None:
        """Held-out rows after examples of training rows; None: not asked for."""
        spec = self._spec
        if spec.scoring is None or not spec.scoring.few_shot:
            return None
        task = self.tasks[0]
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
            is_chat=self.tokenizer.template is not None,
        )
        samples = tokenise(rows, self.tokenizer, max_tokens=sys.maxsize)
        longest = int(samples.prompt_tokens.max())
        if longest > spec.data.max_tokens:
            raise ConfigError(
                f"the longest prompt with scoring.few_shot: {spec.scoring.few_shot} examples has {longest} tokens, "
                f"data.max_tokens is {spec.data.max_tokens}; raise it, or take fewer examples"
            )
        return samples

    @functools.cached_property
    def general(self) -> GeneralText | None:
        """General text to measure on; None: not asked for."""
        spec = self._spec
        evaluation = spec.evaluation
        is_language_model = spec.objective.counted != "rows" and spec.objective.row_use != "source_target"
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
            path, self.tokenizer, row_tokens=self.row_tokens, label_tokens=self.label_tokens_per_row
        )

    @property
    def general_samples(self) -> Samples:
        """Windows of the general text."""
        assert self.general is not None, "the coordinator knows from prepare that there is no general text"
        return self.general.samples

    @functools.cached_property
    def unpacked_train(self) -> Batchable:
        """Training rows, each a sequence of its own."""
        return _joined([task.train.samples for task in self.tasks if task.train is not None])

    @functools.cached_property
    def train(self) -> Batchable:
        """Training rows as they are fed."""
        data = self._spec.data
        if not data.packing:
            return self.unpacked_train
        return _joined([pack(task.train.samples, data.max_tokens) for task in self.tasks if task.train is not None])

    @functools.cached_property
    def mixture(self) -> Mixture | None:
        """How tasks take turns; None: there is one."""
        train = self.train
        if not isinstance(train, JoinedSamples):
            return None
        weights = [task.source.weight for task in self.tasks if task.train is not None]
        return make_mixture([len(part) for part in train.parts], weights, self._spec.data.mixing_temperature)

    @property
    def _held_out_parts(self) -> list[Samples]:
        return [task.held_out.samples for task in self.tasks if task.held_out is not None]

    @functools.cached_property
    def held_out(self) -> Batchable:
        """Held-out rows of all data sets."""
        if not self._held_out_parts:
            raise DataError("this needs held-out rows: set data.eval")
        return _joined(self._held_out_parts)

    def _rows(self, source: TaskConfig, path: str, limit: int | None) -> Rows:
        return read_rows(Path(path), source.format, limit, columns=source.columns)

    def _read(self, source: TaskConfig, path: str, limit: int | None) -> RowSet:
        rows, objective = self._rows(source, path, limit), self._spec.objective
        samples = tokenise(
            rows,
            self.tokenizer,
            max_tokens=self._spec.data.max_tokens,
            train_on=objective.labelled_tokens,
            use=objective.row_use,
            counted=objective.counted,
            class_names=self.class_names,
            spread=None if self._spread is None else self._spread(model_folder(self._spec.model.path)),
        )
        return RowSet(rows, samples)

    def files(self) -> tuple[SourceFile, ...]:
        """Every file, as the card names it."""
        files = []
        for task in self.tasks:
            of_task = f" of {task.source.name}" if self._spec.data.tasks else ""
            for use, one in (("training", task.train), ("held-out", task.held_out)):
                if one is not None:
                    rows = one.rows
                    files.append(
                        SourceFile(use=use + of_task, name=rows.path.name, sha256=rows.sha256, num_rows=len(rows))
                    )
        return tuple(files)

    def task_rows(self) -> tuple[TaskRows, ...]:
        """Where each data set's held-out rows lie among those of all."""
        found: list[TaskRows] = []
        for task in self.tasks:
            if task.held_out is not None:
                start = found[-1].end_row if found else 0
                end = start + len(task.held_out.samples)
                metric = self._spec.metric_of(task.source)
                found.append(TaskRows(name=task.source.name, start_row=start, end_row=end, metric=metric))
        return tuple(found)

    def scored_rows(self) -> tuple[TaskRows, ...]:
        """What of the held-out rows is scored: all, or the range that the job names.

        Raises:
            ConfigError: there are not so many rows.
        """
        tasks, scoring = self.task_rows(), self._spec.scoring
        if scoring is None or scoring.rows is None or not tasks:
            return tasks
        (only,), (first, end) = tasks, scoring.rows
        if end > only.end_row:
            raise ConfigError(f"scoring.rows ends at {end}, but there are {only.end_row} held-out rows; set it lower")
        return (only.model_copy(update={"start_row": first, "end_row": end}),)

    def method_text_ids(self) -> tuple[int, ...]:
        """Tokens of the text that the method starts from."""
        text = self._spec.method.text
        return tuple(self.tokenizer.encode([text])[0].ids) if text else ()


def _joined(parts: Sequence[Batchable]) -> Batchable:
    return parts[0] if len(parts) == 1 else JoinedSamples(parts)
