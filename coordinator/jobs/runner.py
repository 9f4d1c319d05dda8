"""A job's heavy work on the coordinator's side: rows, batches, scores, export.

:class:`JobRunner` is plain synchronous code without state that matters: every answer is a function of the job's files
and of the question, so a runner that dies is simply started again. Where it runs (a Ray actor, a thread) is not its
business; :mod:`coordinator.jobs.runner_stream` connects it.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

from coordinator.artifacts.assemble import assemble_adapter
from coordinator.artifacts.assemble_model import assemble_model
from coordinator.artifacts.parts import AssembledAdapter, AssembleRequest
from coordinator.artifacts.publish import PublishedAdapter, PublishRequest, publish_adapter
from coordinator.artifacts.verify_process import VerifyReport, VerifyRequest, run_verify_process
from coordinator.jobs.job_rows import JobRows, RowSet
from coordinator.jobs.prepared import PreparedData
from coordinator.jobs.rewards import Answer, rewards_of
from coordinator.jobs.rollouts import Rollouts, advantages_of, prompt_groups, step_of
from coordinator.jobs.scoring import RowVerdict, Score, ScoredSample, ScoreReport, is_right, score
from coordinator.jobs.value_scores import class_verdicts, score_values
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
from plutino.data.mixture import mixture_indices
from plutino.data.samples import Batchable
from plutino.data.tokenisation import Spread
from plutino.job.objective import GrpoConfig
from plutino.job.objective_part import GENERATED_METRICS, MetricName
from plutino.job.spec import JobSpec
from plutino.security.tls import Credentials
from plutino.types import MicroBatchCut
from plutino.wire.bulk import BulkClient

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
        spread: Callable[[Path], Spread] | None = None,
    ) -> None:
        self._credentials = credentials
        self._spec = spec
        self._bulk_address = bulk_address
        self._verify = verify
        self._rows = JobRows(spec, spread)

    def prepare(self) -> PreparedData:
        """Read and tokenise all rows.

        Raises:
            DataError, ModelError: with the lines or files at fault.
        """
        sets = self._rows.sets
        num_train = len(self._rows.train)
        return PreparedData(
            num_train=num_train,
            num_eval=sum(len(task.held_out.samples) for task in self._rows.tasks if task.train and task.held_out),
            num_truncated=sum(one.num_truncated for one in sets),
            total_steps=self._total_steps(num_train),
            row_tokens=self._rows.row_tokens,
            source_tokens=self._rows.source_tokens,
            label_tokens_per_row=self._rows.label_tokens_per_row,
            prompt_tokens=self._rows.prompt_tokens,
            num_general=0 if self._rows.general is None else len(self._rows.general.samples),
            general_sha256="" if self._rows.general is None else self._rows.general.sha256,
            stop_token_ids=self._rows.tokenizer.stop_token_ids,
            mean_row_tokens=float(self._rows.train.lengths.mean()),
            files=self._rows.files(),
            method_text_ids=self._rows.method_text_ids(),
            class_names=self._rows.class_names,
            tasks=self._rows.scored_rows(),
            num_probe=len(self._rows.unpacked_train),
        )

    def _total_steps(self, num_train: int) -> int:
        training, objective = self._spec.training, self._spec.objective
        num_batches = total_steps(num_train, training.batch_size, epochs=training.epochs, steps=training.steps)
        if isinstance(objective, GrpoConfig) and training.steps is None:
            return num_batches * objective.updates
        return num_batches

    def train_batch(self, step: int, micro_batch_size: int, cut: MicroBatchCut = "rows") -> StepBatch:
        """Rows of a training step, in micro-batches of so many sequences, or as many of like tokens."""
        training = self._spec.training
        num_samples = self._samples_of(micro_batch_size)
        if training.activation_cache != "off":
            first_epoch = self._first_epoch(num_samples, cut)
            rows = repeated_micro_batches(first_epoch, step, training.batch_size, num_samples, training.seed)
            return gather_step(self._rows.train, rows)
        return cut_micro_batches(self._rows.train, self._batch_indices(step), num_samples, cut=cut)

    def _batch_indices(self, batch: int) -> tuple[int, ...]:
        training = self._spec.training
        if self._rows.mixture is None:
            return batch_indices(batch, training.batch_size, len(self._rows.train), training.seed)
        return mixture_indices(batch, training.batch_size, self._rows.mixture, training.seed)

    def rollout_prompts(self, step: int) -> list[MicroBatchRows]:
        """Prompts of the answers that a step learns from, in groups that are generated together."""
        config = self._grpo
        return prompt_groups(self._rows.train, self._batch_indices(step // config.updates), config)

    def reward(self, rollouts: Rollouts) -> Rollouts:
        """What sampled answers are worth.

        Raises:
            ConfigError: a reward function fails.
        """
        config, tokenizer = self._grpo, self._rows.tokenizer
        numbers = sorted(rollouts.tokens)
        rows = {number: self._rows.train_row(number // config.answers) for number in numbers}
        answers = [
            Answer(
                prompt=rows[number].question,
                answer=tokenizer.decode(rollouts.tokens[number]),
                truth=rows[number].answer,
                line_number=rows[number].line_number,
                adapter_reward=rollouts.adapter_rewards.get(number),
            )
            for number in numbers
        ]
        by_source = rewards_of(config.rewards, answers)
        weights = [source.weight for source in config.rewards]
        totals = [
            math.fsum(w * v for w, v in zip(weights, values, strict=True)) for values in zip(*by_source, strict=True)
        ]
        rewards = dict(zip(numbers, totals, strict=True))
        names = [f"reward {index} {source.type}" for index, source in enumerate(config.rewards)]
        means = {name: math.fsum(values) / len(values) for name, values in zip(names, by_source, strict=True)}
        return rollouts.model_copy(
            update={
                "rewards": rewards,
                "by_source": means if len(means) > 1 else {},
                "advantages": advantages_of(rewards, config),
            }
        )

    def rollout_batch(self, rollouts: Rollouts, micro_batch_size: int) -> StepBatch:
        """Rows of a training step on sampled answers."""
        return step_of(rollouts, self._rows.train, self._grpo, micro_batch_size)

    @property
    def _grpo(self) -> GrpoConfig:
        objective = self._spec.objective
        assert isinstance(objective, GrpoConfig), f"objective {objective.type} samples nothing"
        return objective

    @functools.lru_cache(maxsize=1)  # noqa: B019 - a runner lives as long as its process
    def _first_epoch(self, micro_batch_size: int, cut: MicroBatchCut) -> tuple[tuple[int, ...], ...]:
        training = self._spec.training
        return first_epoch_micro_batches(self._rows.train, training.batch_size, micro_batch_size, training.seed, cut)

    def eval_batch(
        self,
        start_row: int,
        num_rows: int,
        micro_batch_size: int,
        *,
        from_training: bool,
        general: bool = False,
        by_token: bool = False,
    ) -> StepBatch:
        """Rows of one evaluation unit, in order and never packed: held-out or training ones, or general text.

        With ``by_token`` its loss is the mean over label tokens, whatever the objective's is the mean over.
        """
        rows = self._rows
        samples = rows.unpacked_train if from_training else rows.general_samples if general else rows.held_out
        indices = range(start_row, min(start_row + num_rows, len(samples)))
        counted = "label tokens" if by_token else samples.counted
        return cut_micro_batches(samples, indices, self._samples_of(micro_batch_size), counted)

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
        samples: Batchable | None = self._rows.few_shot if few_shot else self._rows.held_out
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
        kept: dict[str, tuple[RowVerdict, ...]] = {}
        first_rows = {task.name: task.start_row for task in self._rows.task_rows()}
        for task in self._rows.scored_rows():
            held_out = next(one.held_out for one in self._rows.tasks if one.source.name == task.name)
            assert held_out is not None, "only tasks with held-out rows are listed"
            first = first_rows[task.name]
            own = {row - first: values for row, values in rows.items() if task.start_row <= row < task.end_row}
            if task.metric == "perplexity":
                num_rows = task.end_row - task.start_row
                scores[task.name] = Score(metric=task.metric, num_rows=num_rows, perplexity=perplexities[task.name])
            elif task.metric in GENERATED_METRICS:
                scores[task.name], samples, kept[task.name] = self._score_answers(task.metric, held_out, own)
                shown += samples
            else:
                labels = held_out.samples.labels
                true = [] if labels is None else [float(labels[row]) for row in sorted(own)]
                scores[task.name] = score_values(task.metric, [own[row] for row in sorted(own)], true)
                if task.metric == "classes":
                    by_row = dict(zip(sorted(own), true, strict=True))
                    kept[task.name] = class_verdicts(own, by_row, self._rows.class_names)
        return ScoreReport(
            score=next(iter(scores.values())),
            samples=tuple(shown[: self._num_shown]),
            by_task=scores if self._spec.data.tasks else {},
            rows=kept if self._num_shown is None else {},
        )

    @property
    def _num_shown(self) -> int | None:
        scoring = self._spec.scoring
        return None if scoring is not None and scoring.keep_answers else _SHOWN_SAMPLES

    def _score_answers(
        self, metric: MetricName, held_out: RowSet, rows: Mapping[int, list[float]]
    ) -> tuple[Score, list[ScoredSample], tuple[RowVerdict, ...]]:
        indices = sorted(rows)
        answers = [self._rows.tokenizer.decode(int(token) for token in rows[index]) for index in indices]
        truth_rows = [held_out.rows.rows[index] for index in indices]
        truths = [row.answer for row in truth_rows]
        samples = [
            ScoredSample(prompt=row.question, answer=answer, truth=row.answer)
            for row, answer in list(zip(truth_rows, answers, strict=True))[: self._num_shown]
        ]
        verdicts = tuple(
            RowVerdict(row=index, is_right=is_right(metric, answer, truth), answer=answer)
            for index, answer, truth in zip(indices, answers, truths, strict=True)
        )
        return score(metric, answers, truths), samples, verdicts

    def assemble(self, request: AssembleRequest) -> AssembledAdapter:
        """Join the stages' parts into one verified, staged adapter."""
        assemble = assemble_model if self._spec.method.trains_weights else assemble_adapter
        return assemble(request, self._spec, BulkClient(self._bulk_address, self._credentials), verify=self._verify)

    def publish(self, request: PublishRequest) -> PublishedAdapter:
        """Make the staged adapter visible, whole, with its card."""
        return publish_adapter(request)


def rows_from_json(text: str) -> dict[int, list[float]]:
    """Generated tokens, or the objective's values, by held-out row."""
    return {int(row): tokens for row, tokens in json.loads(text).items()}
