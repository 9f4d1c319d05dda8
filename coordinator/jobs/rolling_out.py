"""Answers that a step learns from: sampled through the pipeline, scored, and on the disk before the step is fed.

A step that is done again after a loss finds its answers there, so that it has the bits of the first time whatever the
rewards depend on. What lies there of steps whose state is durable is removed.
"""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

from coordinator.artifacts.durable import sync_dir, write_durable
from coordinator.jobs.context import JobContext
from coordinator.jobs.prepared import PreparedData
from coordinator.jobs.rollouts import Rollouts, warning_of
from coordinator.jobs.units import Batch, ask_batch, evaluate_batch, generate_batch, train_batch
from plutino.errors import JobError
from plutino.events import Notice
from plutino.job.objective import GrpoConfig
from protos import runners_pb2 as runner_pb
from protos import workers_pb2 as pb

_FOLDER = "rollouts"


class StepRows:
    """What a step's rows are made of: the data alone, or answers that the model samples."""

    def __init__(self, context: JobContext, prepared: PreparedData) -> None:
        self._context = context
        self._prepared = prepared
        objective = context.spec.objective
        self._config = objective if isinstance(objective, GrpoConfig) else None
        self._rollouts: Rollouts | None = None

    def last_known(self, step: int, last: int) -> int:
        """The end of the steps from this one on whose rows can be made now, at most ``last``."""
        return last if self._config is None else min(last, self._config.first_step_of(step) + self._config.updates)

    async def make(self, step: int) -> None:
        """Have what the rows of a step are made of. All steps before it are committed."""
        if self._config is None:
            return
        first_step = self._config.first_step_of(step)
        if self._rollouts is not None and self._rollouts.first_step == first_step:
            return
        path = self._folder / f"{first_step}.json"
        if path.exists():
            self._rollouts = Rollouts.model_validate_json(path.read_bytes())
            return
        if step != first_step:
            raise JobError(
                f"the answers that steps {first_step} to {first_step + self._config.updates - 1} learn from are gone "
                f"from {path}: the coordinator's disk has lost them; submit the job anew"
            )
        self._rollouts = await self._roll_out(self._config, step)
        if text := warning_of(self._rollouts):
            await self._context.tell(Notice(level="warning", text=text))
        await asyncio.to_thread(self._keep, path, self._rollouts.model_dump_json().encode())

    async def batch(self, step: int) -> Batch:
        """The rows of a step."""
        if self._config is None:
            return await train_batch(self._context, step)
        assert self._rollouts is not None, "answers are sampled before rows are asked for"
        return await self._ask_batch(self._config, self._rollouts)

    @property
    def counts(self) -> dict[str, float]:
        """What people see of the answers; empty where none are sampled."""
        return {} if self._rollouts is None else self._rollouts.counts

    @property
    def _folder(self) -> Path:
        return self._context.job_dir / _FOLDER

    async def _roll_out(self, config: GrpoConfig, step: int) -> Rollouts:
        context = self._context
        ask = runner_pb.GetRolloutPrompts(step=step)
        prompts = await ask_batch(context, runner_pb.RunnerCommand(get_rollout_prompts=ask))
        options = pb.GenerateOptions(
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            stop_tokens=self._prepared.stop_token_ids,
            use_adapter=True,
            step=step,
            keep_stop=True,
        )
        rollouts = Rollouts(first_step=step, tokens=await generate_batch(context, prompts, options))
        if config.reward_adapters:
            batch = await self._ask_batch(config, rollouts)
            seen = await evaluate_batch(context, batch, by_reward_adapter=True)
            rollouts = rollouts.model_copy(
                update={"adapter_rewards": {sample: values[0] for sample, values in seen.values.items()}}
            )
        reward = runner_pb.Reward(rollouts_json=rollouts.model_dump_json())
        answer = await context.runner.ask(runner_pb.RunnerCommand(reward=reward))
        rollouts = Rollouts.model_validate_json(answer[-1].rewarded.json)
        if config.updates == 1:
            return rollouts
        seen = await evaluate_batch(context, await self._ask_batch(config, rollouts))
        logps = {number: tuple(values[: len(rollouts.tokens[number])]) for number, values in seen.values.items()}
        return rollouts.model_copy(update={"logps": logps})

    async def _ask_batch(self, config: GrpoConfig, rollouts: Rollouts) -> Batch:
        ask = runner_pb.GetRolloutBatch(
            rollouts_json=rollouts.model_dump_json(), micro_batch_size=self._context.numerics.micro_batch_size
        )
        command = runner_pb.RunnerCommand(get_rollout_batch=ask)
        return await ask_batch(self._context, command, answers_per_row=config.answers)

    def _keep(self, path: Path, data: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".part")
        write_durable(unfinished, data)
        unfinished.replace(path)
        sync_dir(path.parent)
        assert self._config is not None
        durable = max(self._context.durable(), default=0)
        for old in path.parent.glob("*.json"):
            if int(old.stem) + self._config.updates <= durable:
                old.unlink()


def delete_rollouts(job_dir: Path) -> None:
    """Remove what a job that has ended sampled."""
    shutil.rmtree(job_dir / _FOLDER, ignore_errors=True)
