"""Sampled answers as values: what a step of GRPO learns from, before and after it has rewards.

A sample's number is ``row * answers + copy``: it names the answer in seeds, messages and files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from plutino.data.batches import MicroBatchRows, StepBatch
from plutino.data.samples import Batchable
from plutino.job.objective import GrpoConfig

_SMALLEST_DEVIATION = 1e-4
"""Added to the standard deviation, as in TRL: rewards that differ by noise alone must not become large advantages."""


class Rollouts(BaseModel):
    """The answers that the steps from ``first_step`` on learn from."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    first_step: int
    tokens: dict[int, tuple[int, ...]]
    """By sample: its new tokens, with the stop token if it ended."""
    adapter_rewards: dict[int, float] = {}
    """By sample: what the reward adapter gave; empty without one."""
    rewards: dict[int, float] = {}
    """By sample: the weighted sum of its sources."""
    by_source: dict[str, float] = {}
    """Mean of each source that there are several of, without its weight."""
    advantages: dict[int, float] = {}
    logps: dict[int, tuple[float, ...]] = {}
    """By sample: log-probability of each token when it was sampled; empty where each answer is used once."""

    @property
    def counts(self) -> dict[str, float]:
        """What people see of them."""
        rewards = list(self.rewards.values())
        num_tokens = sum(len(tokens) for tokens in self.tokens.values())
        return {
            "reward": float(np.mean(rewards)),
            "reward_std": float(np.std(rewards)),
            "answer_tokens": num_tokens / len(self.tokens),
            **self.by_source,
        }


def warning_of(rollouts: Rollouts) -> str:
    """What to tell of the first answers of a job; empty if there is nothing."""
    if rollouts.first_step > 0 or len(set(rollouts.rewards.values())) > 1:
        return ""
    reward = next(iter(rollouts.rewards.values()), 0.0)
    return (
        f"all {len(rollouts.rewards)} answers of the first step have the reward {reward:g}; "
        "such a step teaches nothing. If this goes on, begin with a tuned adapter (training.init_adapter), sample more "
        "answers or at a higher objective.temperature, or give a reward that tells answers apart"
    )


def advantages_of(rewards: Mapping[int, float], config: GrpoConfig) -> dict[int, float]:
    """How much better each sample is than its group, whose samples have consecutive numbers."""
    numbers = sorted(rewards)
    totals_PG = np.array([rewards[number] for number in numbers], np.float64).reshape(-1, config.answers)
    above_PG = totals_PG - totals_PG.mean(axis=1, keepdims=True)
    if config.scale == "group":
        above_PG /= totals_PG.std(axis=1, ddof=1, keepdims=True) + _SMALLEST_DEVIATION
    elif config.scale == "batch":
        above_PG /= totals_PG.std(ddof=1) + _SMALLEST_DEVIATION
    return dict(zip(numbers, above_PG.reshape(-1).tolist(), strict=True))


def prompt_groups(rows: Batchable, indices: Sequence[int], config: GrpoConfig) -> list[MicroBatchRows]:
    """The prompts of these rows, each as often as it is answered, in groups of like length."""
    prompts = {index: rows.prompt(index) for index in indices}
    order = sorted(indices, key=lambda index: (-len(prompts[index]), index))
    samples = [index * config.answers + copy for index in order for copy in range(config.answers)]
    return [
        _gathered(group, [prompts[sample // config.answers] for sample in group], [()] * len(group))
        for group in (samples[first : first + config.group_rows] for first in range(0, len(samples), config.group_rows))
    ]


def step_of(rollouts: Rollouts, rows: Batchable, config: GrpoConfig, micro_batch_size: int) -> StepBatch:
    """A training step on sampled answers, cut as :func:`plutino.data.batches.cut_micro_batches` cuts rows.

    Rollouts without advantages give rows to be scored.
    """
    prompts = {sample: rows.prompt(sample // config.answers) for sample in rollouts.tokens}
    order = sorted(rollouts.tokens, key=lambda sample: (-(len(prompts[sample]) + len(rollouts.tokens[sample])), sample))
    parts = [order[first : first + micro_batch_size] for first in range(0, len(order), micro_batch_size)]
    micro_batches = tuple(
        _gathered(
            part,
            [prompts[sample] for sample in part],
            [rollouts.tokens[sample] for sample in part],
            advantages=[rollouts.advantages[sample] for sample in part] if rollouts.advantages else None,
            logps=[value for sample in part for value in rollouts.logps[sample]] if rollouts.logps else None,
        )
        for part in parts
    )
    num_tokens = sum(len(tokens) for tokens in rollouts.tokens.values())
    weights = {"grpo": len(order), "dapo": num_tokens, "dr_grpo": len(order) * config.max_new_tokens}
    return StepBatch(micro_batches=micro_batches, loss_weight=weights[config.loss])


def _gathered(
    samples: Sequence[int],
    prompts: Sequence[NDArray[np.int32]],
    answers: Sequence[Sequence[int]],
    *,
    advantages: Sequence[float] | None = None,
    logps: Sequence[float] | None = None,
) -> MicroBatchRows:
    lengths = [len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True)]
    pieces = [piece for pair in zip(prompts, answers, strict=True) for piece in pair]
    masks = [
        np.repeat(np.array([0, 1], np.uint8), [len(prompt), len(answer)])
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    return MicroBatchRows(
        lengths=np.array(lengths, np.int32),
        input_ids=np.concatenate([np.asarray(piece, np.int32) for piece in pieces]),
        label_mask=np.concatenate(masks),
        padded_tokens=max(lengths),
        sample_indices=tuple(samples),
        advantages=None if advantages is None else np.array(advantages, np.float32),
        sampled_logps=None if logps is None else np.array(logps, np.float32),
    )
