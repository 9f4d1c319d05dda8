"""A job's heavy work on the coordinator's side: rows, batches, scores, export.

:class:`JobRunner` is plain synchronous code without state that matters: every answer is a function of the job's files
and of the question, so a runner that dies is simply started again. Where it runs (a Ray actor, a thread) is not its
business; :mod:`coordinator.jobs.runner_stream` connects it.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from coordinator.artifacts.assemble import AssembledAdapter, AssembleRequest, assemble_adapter
from coordinator.artifacts.assemble_model import assemble_model
from coordinator.artifacts.publish import PublishedAdapter, PublishRequest, publish_adapter
from coordinator.artifacts.verify_process import VerifyReport, VerifyRequest, run_verify_process
from coordinator.jobs.scoring import Score, score
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
from plutino.data.readers import Rows, read_rows
from plutino.data.samples import Samples
from plutino.data.tokenisation import ModelTokenizer, load_tokenizer, tokenise
from plutino.errors import ConfigError, DataError
from plutino.hub_id import model_folder
from plutino.job.spec import JobSpec
from plutino.security.tls import Credentials
from plutino.wire.bulk import BulkClient


class PreparedData(BaseModel):
    """What the coordinator needs to know of a job's rows to plan and to run it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    num_train: int
    num_eval: int
    num_truncated: int
    total_steps: int
    row_tokens: int
    """Tokens of the longest training or held-out row."""
    label_tokens_per_row: int
    """Most label tokens in one row."""
    prompt_tokens: int
    """Tokens of the longest held-out prompt; 0 without held-out rows."""
    stop_token_ids: tuple[int, ...]
    train_sha256: str
    eval_sha256: str
    mean_row_tokens: float
    num_general: int = 0
    """Windows of general text to measure on; 0: not asked for."""
    general_sha256: str = ""
    method_text_ids: tuple[int, ...] = ()
    """Tokens of the text that the method starts from."""


class ScoredSample(BaseModel):
    """One held-out row as people see it."""

    model_config = ConfigDict(frozen=True)

    prompt: str
    answer: str
    truth: str


class ScoreReport(BaseModel):
    """A score and the first rows behind it."""

    model_config = ConfigDict(frozen=True)

    score: Score
    samples: tuple[ScoredSample, ...]


@dataclass(frozen=True, slots=True)
class _RowSet:
    rows: Rows
    samples: Samples


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
        train = self._train
        held_out = self._held_out
        sets = self._row_sets
        return PreparedData(
            num_train=len(train.samples),
            num_eval=0 if held_out is None else len(held_out.samples),
            num_truncated=sum(one.samples.num_truncated for one in sets),
            total_steps=total_steps(
                len(train.samples), training.batch_size, epochs=training.epochs, steps=training.steps
            ),
            row_tokens=self._row_tokens,
            label_tokens_per_row=self._label_tokens_per_row,
            prompt_tokens=max((int(one.prompt_tokens.max()) for one in self._prompted), default=0),
            num_general=0 if self._general is None else len(self._general.samples),
            general_sha256="" if self._general is None else self._general.sha256,
            stop_token_ids=self._tokenizer.stop_token_ids,
            train_sha256=train.rows.sha256,
            eval_sha256="" if held_out is None else held_out.rows.sha256,
            mean_row_tokens=float(train.samples.lengths.mean()),
            method_text_ids=self._method_text_ids(),
        )

    def _method_text_ids(self) -> tuple[int, ...]:
        text = self._spec.method.text
        return tuple(self._tokenizer.encode([text])[0].ids) if text else ()

    def train_batch(self, step: int, micro_batch_size: int) -> StepBatch:
        """Rows of a training step."""
        samples = self._train.samples
        training = self._spec.training
        if training.activation_cache != "off":
            first_epoch = self._first_epoch(micro_batch_size)
            rows = repeated_micro_batches(first_epoch, step, training.batch_size, micro_batch_size, training.seed)
            return gather_step(samples, rows)
        indices = batch_indices(step, training.batch_size, len(samples), training.seed)
        return cut_micro_batches(samples, indices, micro_batch_size)

    @functools.lru_cache(maxsize=1)  # noqa: B019 - a runner lives as long as its process
    def _first_epoch(self, micro_batch_size: int) -> tuple[tuple[int, ...], ...]:
        training = self._spec.training
        return first_epoch_micro_batches(self._train.samples, training.batch_size, micro_batch_size, training.seed)

    def eval_batch(
        self, start_row: int, num_rows: int, micro_batch_size: int, *, from_training: bool, general: bool = False
    ) -> StepBatch:
        """Rows of one evaluation unit, in file order: held-out ones, training ones, or windows of general text."""
        if general:
            assert self._general is not None, "the coordinator knows from prepare that there is no general text"
            samples = self._general.samples
        else:
            samples = self._train.samples if from_training else self._need_held_out().samples
        indices = range(start_row, min(start_row + num_rows, len(samples)))
        return cut_micro_batches(samples, indices, micro_batch_size)

    def prompts(
        self, start_row: int, num_groups: int, group_rows: int, *, few_shot: bool = False
    ) -> list[MicroBatchRows]:
        """Prompts of one generation unit, cut into groups; with ``few_shot``, examples stand before each."""
        samples = self._few_shot if few_shot else self._need_held_out().samples
        assert samples is not None, "few-shot prompts are asked for by the spec"
        end_row = min(start_row + num_groups * group_rows, len(samples))
        return [
            prompt_micro_batch(samples, range(first, min(first + group_rows, end_row)))
            for first in range(start_row, end_row, group_rows)
        ]

    def score(self, rows: Mapping[int, list[int]]) -> ScoreReport:
        """Compare generated tokens with the held-out rows' answers."""
        assert self._spec.scoring is not None
        held_out = self._need_held_out()
        indices = sorted(rows)
        answers = [self._tokenizer.decode(rows[index]) for index in indices]
        truths = [held_out.rows.rows[index].answer for index in indices]
        samples = tuple(
            ScoredSample(prompt=held_out.rows.rows[index].question, answer=answer, truth=truth)
            for index, answer, truth in list(zip(indices, answers, truths, strict=True))[:_SHOWN_SAMPLES]
        )
        return ScoreReport(score=score(self._spec.scoring.metric, answers, truths), samples=samples)

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
    def _train(self) -> _RowSet:
        return self._read(self._spec.data.train, self._spec.data.limit)

    @functools.cached_property
    def _held_out(self) -> _RowSet | None:
        if self._spec.data.eval is None:
            return None
        return self._read(self._spec.data.eval, self._spec.data.eval_limit)

    @property
    def _row_sets(self) -> list[_RowSet]:
        return [self._train] if self._held_out is None else [self._train, self._held_out]

    @functools.cached_property
    def _row_tokens(self) -> int:
        return max(int(one.samples.lengths.max()) for one in self._row_sets)

    @functools.cached_property
    def _label_tokens_per_row(self) -> int:
        return max(
            int(one.samples.mask(index)[1:].sum()) for one in self._row_sets for index in range(len(one.samples))
        )

    @property
    def _prompted(self) -> list[Samples]:
        """Rows whose prompts may be answered."""
        if self._held_out is None:
            return []
        return [self._held_out.samples, *([] if self._few_shot is None else [self._few_shot])]

    @functools.cached_property
    def _few_shot(self) -> Samples | None:
        spec = self._spec
        if spec.scoring is None or not spec.scoring.few_shot:
            return None
        rows = with_examples(
            self._need_held_out().rows,
            self._train.rows,
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
        is_language_model = spec.objective.row_use == "answers" and not spec.objective.has_score_head
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

    def _need_held_out(self) -> _RowSet:
        if self._held_out is None:
            raise DataError("this needs held-out rows: set data.eval")
        return self._held_out

    def _read(self, path: str, limit: int | None) -> _RowSet:
        data = self._spec.data
        if self._spec.objective.row_use != "answers":
            raise DataError(f"rows for objective.type: {self._spec.objective.type} cannot be read yet; use sft")
        rows = read_rows(Path(path), data.format, limit)
        samples = tokenise(
            rows, self._tokenizer, max_tokens=data.max_tokens, train_on=self._spec.objective.labelled_tokens
        )
        return _RowSet(rows, samples)


def rows_from_json(text: str) -> dict[int, list[int]]:
    """Generated tokens by held-out row."""
    return {int(row): tokens for row, tokens in json.loads(text).items()}
