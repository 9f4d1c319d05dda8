from __future__ import annotations

import pytest
import torch
from transformers import get_scheduler

from plutino.job.training import TrainingConfig, learning_rate

NAMES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


def transformers_rates(config: TrainingConfig, total_steps: int, num_steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.lr)
    scheduler = get_scheduler(NAMES[config.lr_schedule], optimizer, config.warmup_steps, total_steps)
    rates = []
    for _ in range(num_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(("warmup_steps", "total_steps"), [(0, 125), (7, 125), (1, 3), (10, 10), (12, 10), (0, 1)])
@pytest.mark.parametrize("schedule", NAMES)
def test_learning_rate_is_to_the_bit_that_of_transformers(schedule, warmup_steps, total_steps):
    config = TrainingConfig(lr=2e-3, lr_schedule=schedule, warmup_steps=warmup_steps)
    steps = range(total_steps + 3)

    rates = [learning_rate(step, config, total_steps) for step in steps]

    assert rates == transformers_rates(config, total_steps, len(steps))


def test_learning_rate_of_constant_without_warmup_is_constant():
    config = TrainingConfig(lr=0.5, lr_schedule="constant")

    assert {learning_rate(step, config, 4) for step in range(6)} == {0.5}
