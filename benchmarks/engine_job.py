"""A job in one process: its runner makes rows and scores, the engine runs its steps, the barrier decides them.

No plan, no wire and no devices, so that many jobs fit on a host side by side. Losses and adapters have the bits of the
same job on devices with as many threads.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from coordinator.jobs.barrier import Commit, Vote, decide, open_barrier
from coordinator.jobs.prepared import TaskRows, for_devices
from coordinator.jobs.rollouts import Rollouts
from coordinator.jobs.runner import JobRunner
from coordinator.jobs.scoring import ScoreReport
from edge_node.activation_cache.stage_cache import StageCache
from edge_node.activation_cache.store import ActivationStore
from edge_node.engine.generate import GenerateOptions
from edge_node.engine.reference import InProcessPipeline
from edge_node.engine.unit import StepOutcome
from edge_node.stage.stage import Stage
from edge_node.stage.weights import LocalSource
from edge_node.transport.base import Peer
from plutino.data.batches import StepBatch
from plutino.errors import NumericsError
from plutino.job.assignment import StageShape
from plutino.job.objective import GrpoConfig
from plutino.job.objective_part import GENERATED_METRICS
from plutino.job.spec import JobSpec
from plutino.sizes import GIB
from plutino.types import JobId, WorkerRef

_CACHE_BYTES = 64 * GIB
_NUM_ROWS_TOGETHER = 32
"""Held-out rows that are measured at once."""


class EngineJob:
    """One job, held open until the ``with`` block ends.

    Args:
        spec: the job; ``training.micro_batch_size`` is the whole batch where it is not set.
        threads: torch's threads in every stage.
        num_stages: stages in this process, of equally many blocks.
        adapter: a published adapter's folder to start from; None starts fresh.
        device: where it computes; None: the processor.
        cache_dir: folder of the activation cache, where the spec asks for one; None: nothing is kept.
    """

    def __init__(
        self,
        spec: JobSpec,
        *,
        threads: int = 1,
        num_stages: int = 1,
        adapter: Path | None = None,
        device: torch.device | None = None,
        cache_dir: Path | None = None,
    ) -> None:
        self.runner = JobRunner(spec, bulk_address="")
        self.prepared = self.runner.prepare()
        self.spec = for_devices(spec, self.prepared)
        self.losses: list[float] = []
        self.rewards: list[float] = []
        """Mean reward of each step's sampled answers."""
        self._rollouts: Rollouts | None = None
        self._serials = itertools.count()
        num_blocks = int(_config_of(spec)["num_hidden_layers"])
        borders = [round(stage * num_blocks / num_stages) for stage in range(num_stages + 1)]
        stages = [StageShape(start_block=start, end_block=end) for start, end in itertools.pairwise(borders)]
        source = LocalSource(Path(spec.model.path))
        self._caches: list[StageCache] = []
        codec = spec.training.activation_cache

        def cache_of(stage: Stage) -> StageCache:
            assert cache_dir is not None and codec != "off"
            store = ActivationStore(cache_dir, _CACHE_BYTES)
            self._caches.append(StageCache(store, "one-job", stage, codec))
            return self._caches[-1]

        self.pipeline = InProcessPipeline(
            lambda: source,
            self.spec,
            stages,
            total_steps=self.prepared.total_steps,
            threads=threads,
            device=device,
            activation_cache=None if cache_dir is None or codec == "off" else cache_of,
        )
        if adapter is not None:
            self.load(load_file(adapter / "adapter_model.safetensors"))

    def __enter__(self) -> EngineJob:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.pipeline.close()
        for cache in self._caches:
            cache.close()

    @property
    def micro_batch_size(self) -> int:
        """Rows that go through the pipeline together."""
        return self.spec.training.micro_batch_size or self.spec.training.batch_size

    def train(self, after_step: Callable[[int], None] = lambda _: None, num_steps: int | None = None) -> list[float]:
        """Run the steps that are left, or so many of them; gives the losses of all steps so far.

        Raises:
            NumericsError: a step is not finite.
        """
        first = len(self.losses)
        last = self.prepared.total_steps if num_steps is None else min(first + num_steps, self.prepared.total_steps)
        for step in range(first, last):
            self.step(step, self._batch(step))
            after_step(step + 1)
        return self.losses

    def _batch(self, step: int) -> StepBatch:
        objective = self.spec.objective
        if not isinstance(objective, GrpoConfig):
            return self.runner.train_batch(step, self.micro_batch_size)
        if self._rollouts is None or self._rollouts.first_step != objective.first_step_of(step):
            self._rollouts = self._roll_out(objective, step)
            self.rewards.append(self._rollouts.counts["reward"])
        return self.runner.rollout_batch(self._rollouts, self.micro_batch_size)

    def _roll_out(self, config: GrpoConfig, step: int) -> Rollouts:
        groups = self.runner.rollout_prompts(step)
        indices = tuple(group.sample_indices for group in groups)
        options = GenerateOptions(
            max_new_tokens=config.max_new_tokens,
            stop_tokens=self.prepared.stop_token_ids,
            temperature=config.temperature,
            top_p=config.top_p,
            keep_stop=True,
            step=step,
            sample_indices=indices,
        )
        answers = self.pipeline.generate(next(self._serials), groups, options)
        tokens = {sample: tuple(map(int, own)) for sample, own in _by_row(indices, answers).items()}
        rollouts = self.runner.reward(Rollouts(first_step=step, tokens=tokens))
        if config.updates == 1:
            return rollouts
        batch = self.runner.rollout_batch(rollouts, self.micro_batch_size)
        _, values = self.pipeline.evaluate_rows(next(self._serials), batch.micro_batches)
        logps = {
            sample: tuple(own[: len(tokens[sample])])
            for rows, of_rows in zip(batch.micro_batches, values, strict=True)
            for sample, own in zip(rows.sample_indices, of_rows.tolist(), strict=True)
        }
        return rollouts.model_copy(update={"logps": logps})

    def step(self, step: int, batch: StepBatch) -> None:
        """Run one step and apply it.

        Raises:
            NumericsError: it is not finite.
        """
        outcomes = self.pipeline.train_step(step, batch.micro_batches, batch.loss_weight)
        decision = self._decide(step, batch.loss_weight, outcomes)
        self.pipeline.commit(step, decision.clip_scale)
        self.losses.append(decision.loss)

    def evaluate(self, start_row: int = 0, end_row: int | None = None, *, use_adapter: bool = True) -> float:
        """Mean loss of held-out rows."""
        return self._measure(start_row, self.prepared.num_eval if end_row is None else end_row, use_adapter)[0]

    def general(self, *, use_adapter: bool = True) -> float:
        """Mean loss of the general text, in nats a token.

        Raises:
            AssertionError: the spec does not ask for it.
        """
        return self._measure(0, self.prepared.num_general, use_adapter, is_general=True)[0]

    def score(self, *, use_adapter: bool = True) -> ScoreReport:
        """Score every task's held-out rows as its metric asks.

        Raises:
            DataError: there are none.
        """
        rows: dict[int, list[float]] = {}
        perplexities: dict[str, float] = {}
        for task in self.prepared.tasks:
            if task.metric in GENERATED_METRICS:
                rows |= self._answers(task, use_adapter)
                continue
            is_perplexity = task.metric == "perplexity"
            loss, values = self._measure(task.start_row, task.end_row, use_adapter, by_token=is_perplexity)
            rows |= values
            if is_perplexity:
                perplexities[task.name] = float(torch.tensor(loss).exp())
        return self.runner.score(rows, perplexities)

    def state(self) -> dict[str, Tensor]:
        """The whole adapter by global name."""
        return self.pipeline.state()

    def load(self, state: dict[str, Tensor]) -> None:
        """Put an adapter's values in place of the present ones."""
        for executor in self.pipeline.executors.values():
            executor.method.load(state)

    def save(self, folder: Path) -> None:
        """Write the adapter as peft reads it."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.state(), folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config = next(iter(self.pipeline.executors.values())).method.peft_config()
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")

    def _decide(self, step: int, loss_weight: float, outcomes: dict[Peer, StepOutcome]) -> Commit:
        refs = {me: WorkerRef(JobId("job"), 1, me.stage_index, me.replica_index) for me in outcomes}
        barrier = open_barrier(step=step, workers=refs.values(), loss_weight=loss_weight)
        for me, outcome in outcomes.items():
            names = [parameter.name for parameter in self.pipeline.executors[me].method.parameters]
            barrier = barrier.add_vote(
                Vote(
                    worker=refs[me],
                    step=step,
                    squared_norms=dict(zip(names, outcome.squared_norms, strict=True)),
                    finite=outcome.is_finite,
                    loss_sum=outcome.loss_sum,
                    reason=outcome.reason,
                )
            )
        decision = decide(barrier, self.spec.training.max_grad_norm)
        if not isinstance(decision, Commit):
            raise NumericsError(f"step {step} cannot be applied: {decision}")
        return decision

    def _measure(
        self, start_row: int, end_row: int, use_adapter: bool, *, is_general: bool = False, by_token: bool = False
    ) -> tuple[float, dict[int, list[float]]]:
        loss_sum, loss_weight = 0.0, 0.0
        values: dict[int, list[float]] = {}
        for first in range(start_row, end_row, _NUM_ROWS_TOGETHER):
            num_rows = min(_NUM_ROWS_TOGETHER, end_row - first)
            batch = self.runner.eval_batch(
                first, num_rows, self.micro_batch_size, from_training=False, general=is_general, by_token=by_token
            )
            serial = next(self._serials)
            own_sum, found = self.pipeline.evaluate_rows(serial, batch.micro_batches, use_adapter=use_adapter)
            loss_sum, loss_weight = loss_sum + own_sum, loss_weight + batch.loss_weight
            for rows, of_rows in zip(batch.micro_batches, found, strict=False):
                per_sample = of_rows.reshape(len(rows.sample_indices), -1).tolist()
                values |= dict(zip(rows.sample_indices, per_sample, strict=True))
        return loss_sum / loss_weight, values

    def _answers(self, task: TaskRows, use_adapter: bool) -> dict[int, list[float]]:
        scoring = self.spec.scoring
        assert scoring is not None, "answers are generated where the spec scores them"
        rows: dict[int, list[float]] = {}
        together = len(self.pipeline.executors) * scoring.batch_rows
        for first in range(task.start_row, task.end_row, together):
            groups = self.runner.prompts(first, len(self.pipeline.executors), scoring.batch_rows, task.end_row)
            options = GenerateOptions(
                max_new_tokens=scoring.max_new_tokens,
                stop_tokens=self.prepared.stop_token_ids,
                temperature=scoring.temperature,
                use_adapter=use_adapter,
                step=len(self.losses),
                sample_indices=tuple(group.sample_indices for group in groups),
            )
            answers = self.pipeline.generate(next(self._serials), groups, options)
            rows |= _by_row([group.sample_indices for group in groups], answers)
        return rows


def _by_row(indices: Sequence[Sequence[int]], answers: Sequence[Sequence[Sequence[int]]]) -> dict[int, list[float]]:
    return {
        row: [float(token) for token in tokens]
        for group, of_group in zip(indices, answers, strict=True)
        for row, tokens in zip(group, of_group, strict=True)
    }


def _config_of(spec: JobSpec) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((Path(spec.model.path) / "config.json").read_bytes())
    return values
