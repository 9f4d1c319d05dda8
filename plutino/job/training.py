"""How the adapter is optimised."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from plutino.job.base import SpecPart
from plutino.types import MicroBatchCut


class EarlyStoppingConfig(SpecPart):
    """Stop when the evaluation loss no longer falls."""

    patience: int = Field(3, ge=1)
    """Evaluations in a row without improvement before the job stops."""
    min_delta: float = Field(0.0, ge=0)
    """A smaller fall of the evaluation loss does not count as improvement."""


class TrainingConfig(SpecPart):
    """AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101) over the adapter's parameters."""

    epochs: float | None = Field(None, gt=0)
    """Passes over the training rows; give this or steps. Neither means one epoch."""
    steps: int | None = Field(None, ge=0)
    """Optimiser steps; give this or epochs. 0: the job trains nothing and only scores."""
    batch_size: int = Field(16, ge=1)
    """Rows of one optimiser step."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Rows that go through the pipeline together; None lets the plan choose."""
    micro_batch_cut: Literal["auto"] | MicroBatchCut = "auto"
    """What a step's micro-batches have alike: rows, which pads least in all, or tokens, so that replicas with one each
    take equally long. auto: tokens where the plan chooses the size, and has several devices with the whole model."""
    lr: float = Field(2e-4, gt=0)
    lr_schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    max_grad_norm: float | None = Field(1.0, gt=0)
    """Clip the global gradient norm to this; None does not clip."""
    seed: int = Field(0, ge=0)
    """Fixes initial adapters, data order and dropout."""
    checkpointing: Literal["auto", "on", "off"] = "auto"
    """Recompute each block in the backward pass. auto: only where the memory budgets need it."""
    eval_every: int | None = Field(None, ge=1)
    """Measure the evaluation loss every so many steps; None means only at the end."""
    keep_best: bool = False
    """Publish the adapter of the lowest evaluation loss instead of the last."""
    early_stopping: EarlyStoppingConfig | None = None
    init_adapter: str | None = None
    """Folder of a PEFT adapter to start from; None starts fresh."""
    activation_cache: Literal["off", "raw", "bf16", "int8", "int4"] = "off"
    """Keep what the frozen blocks give on the devices' disks, coded so, and run those blocks once instead of in every
    epoch. Later epochs repeat the first one's micro-batches in another order; with raw they give the bits of epochs
    without a cache. For methods that no block depends on, and for those that train in upper blocks alone."""
    shadow_every: int | Literal["auto"] = "auto"
    """Steps between copies of the training state on the coordinator; auto keeps them under 2 % of the time."""

    @model_validator(mode="after")
    def _one_length(self) -> TrainingConfig:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give epochs or steps, not both")
        if self.early_stopping is not None and self.eval_every is None:
            raise ValueError("early_stopping needs eval_every: it counts evaluations")
        if self.keep_best and self.eval_every is None:
            raise ValueError("keep_best needs eval_every: it compares evaluations")
        if isinstance(self.shadow_every, int) and self.shadow_every < 1:
            raise ValueError("shadow_every must be at least 1 step, or auto")
        return self


def learning_rate(step: int, config: TrainingConfig, total_steps: int) -> float:
    """Learning rate of a step: linear warm-up from 0, then linear to 0, half a cosine to 0, or constant.

    Step numbers start at 0. To the bit what transformers' get_scheduler gives under the same name (constant with
    warm-up: ``constant_with_warmup``), the 0 of the first warm-up step included. A pure function of the step, so that
    a restored or re-planned job needs no scheduler state.
    """
    warmup_steps = config.warmup_steps
    if step < warmup_steps:
        return config.lr * (step / warmup_steps)
    if config.lr_schedule == "constant":
        return config.lr
    decay_steps = max(1, total_steps - warmup_steps)
    if config.lr_schedule == "linear":
        return config.lr * max(0.0, (total_steps - step) / decay_steps)
    return config.lr * max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((step - warmup_steps) / decay_steps))))
