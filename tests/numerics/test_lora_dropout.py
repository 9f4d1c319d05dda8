"""Dropout and recomputation: no partition changes a bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from edge_node.methods.dropout import SeededDropout, dropout_position
from tests.numerics.chain import build_chain, make_batch, run_chain
from tests.numerics.lora_cases import (
    CONFIGS,
    attach,
    chain_gradients,
    joined,
    randomised,
)

# peft itself calls what transformers has deprecated, and warns of untied copies, which the job spec allows.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]


@pytest.mark.parametrize("name", ["dropout", "dora_dropout"])
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_dropout_gradients_do_not_depend_on_partition_or_recomputation(model_dirs, model, name):
    position = {"seed": 1, "step": 2, "micro_batch": 3}
    results = []
    for num_stages, checkpointing in ((1, False), (3, False), (2, True)):
        stages = build_chain(model_dirs[model], num_stages, checkpointing=checkpointing)
        methods = attach(stages, CONFIGS[model][name])
        for method in methods:
            method.load(randomised(joined(methods)))
        results.append(chain_gradients(stages, methods, make_batch("right"), position))

    for other in results[1:]:
        assert all(torch.equal(results[0][key], gradient) for key, gradient in other.items())
    for method in methods:
        for parameter in method.parameters:
            parameter.uses[0][1].grad = None
    without = chain_gradients(stages, methods, make_batch("right"))
    assert not any(torch.equal(without[key], gradient) for key, gradient in results[0].items())


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_checkpointing_gives_the_same_gradients_and_recomputes_each_block_once(model_dirs, model):
    calls, results = [], []
    for checkpointing in (False, True):
        stages = build_chain(model_dirs[model], 2, checkpointing=checkpointing)
        methods = attach(stages, CONFIGS[model]["few"])
        for method in methods:
            method.load(randomised(joined(methods)))
        norms = [
            m for s in stages for n, m in s.model.named_modules() if n.endswith(("post_attention_layernorm", "ln_2"))
        ]
        counted: list[nn.Module] = []
        for norm in norms:
            norm.register_forward_hook(lambda module, *_, counted=counted: counted.append(module))
        results.append(chain_gradients(stages, methods, make_batch("right")))
        calls.append(len(counted))

    assert all(torch.equal(results[0][name], gradient) for name, gradient in results[1].items())
    assert calls == [4, 8]


@torch.no_grad()
def test_checkpointed_stage_still_decodes_with_its_cache(model_dirs):
    batch = make_batch("left")
    stages = build_chain(model_dirs["gpt2"], 2, checkpointing=True)
    caches = [stage.new_cache() for stage in stages]

    with torch.enable_grad():
        run_chain(stages, batch, caches)

    assert [cache.get_seq_length() for cache in caches] == [9, 9]
    assert [len(cache.layers) for cache in caches] == [1, 3]


def test_seeded_dropout_mask_depends_on_position_and_name_only():
    x = torch.ones(4, 50)
    here = {"seed": 1, "step": 2, "micro_batch": 3}

    def mask(name="a", **changed):
        torch.rand(7)
        with dropout_position(**(here | changed)):
            return SeededDropout(0.5, name)(x)

    assert torch.equal(mask(), mask())
    for other in (mask("b"), mask(seed=2), mask(step=3), mask(micro_batch=4)):
        assert not torch.equal(mask(), other)


def test_seeded_dropout_keeps_the_expected_share_and_scale():
    with dropout_position(seed=0, step=0, micro_batch=0):
        dropped = SeededDropout(0.25, "a")(torch.ones(100_000))

    assert set(dropped.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert abs((dropped == 0).float().mean().item() - 0.25) < 0.01


def test_seeded_dropout_is_the_identity_without_a_position():
    x = torch.randn(3)
    dropout = SeededDropout(0.5, "a").train()

    assert dropout(x) is x
    with dropout_position(seed=0, step=0, micro_batch=0):
        assert dropout.is_active and dropout(x) is not x
    assert not dropout.is_active and dropout(x) is x
