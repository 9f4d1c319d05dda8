from __future__ import annotations

import math

import pytest
import torch

from edge_node.methods.lora import attach_lora
from edge_node.stage.verify import part_difference
from plutino.job.method import LoraConfig
from tests.numerics.chain import build_chain
from tests.numerics.pipelines import assert_same_tensors

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def attached(model_dir, dtype=torch.float32):
    """All stages with an adapter that has moved away from its start, where it does nothing."""
    stages = build_chain(model_dir, 3, dtype=dtype)
    methods = [attach_lora(stage, LoraConfig(rank=2, dropout=0.1), seed=1) for stage in stages]
    for method in methods:
        method.load({name: value + 0.05 for name, value in method.state().items()})
    return list(zip(stages, methods, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_part_difference_of_the_same_values_is_zero_on_every_stage(model_dirs, model, dtype):
    for stage, method in attached(model_dirs[model], dtype):
        assert part_difference(stage, method, method.state()) == 0.0


def test_part_difference_sees_any_changed_parameter_and_puts_the_live_ones_back(model_dirs):
    for stage, method in attached(model_dirs["llama"]):
        live = method.state()
        for name in list(live)[:4]:
            assert part_difference(stage, method, live | {name: live[name] * 1.5}) > 0.0
        assert_same_tensors(method.state(), live)


def test_part_difference_of_values_that_are_not_finite_is_no_number(model_dirs):
    stage, method = attached(model_dirs["llama"])[1]
    name, value = next(iter(method.state().items()))

    difference = part_difference(stage, method, method.state() | {name: torch.full_like(value, math.nan)})

    assert difference != 0.0
