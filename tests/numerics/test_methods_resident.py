"""A stage is put back, whatever method hung on it: the next job gets the bits of a stage that was loaded anew."""

from __future__ import annotations

import pytest
import torch

from edge_node.engine.optimizer import StageOptimizer
from edge_node.methods.registry import METHODS
from edge_node.stage.build import StageInput, build_stage
from edge_node.stage.resident import ResidentStage
from edge_node.stage.weights import LocalSource
from plutino.job.method import LoraConfig
from plutino.job.model import ModelConfig, packing_of
from plutino.job.training import TrainingConfig
from tests.numerics.method_cases import CASES, CONFIGS

EVERYTHING = LoraConfig(rank=3, use_dora=True, dropout=0.1, modules_to_save=("lm_head", "embed_tokens"))
IDS = torch.arange(2, 12)[None]


def stage_of(model_dir, scheme="none"):
    packing = packing_of(ModelConfig(path=str(model_dir)), scheme)
    return build_stage(LocalSource(model_dir), 0, 4, dtype=torch.float32, packing=packing, checkpointing=True)


def logits(stage, num_prompt_tokens=0):
    num_tokens = IDS.shape[1] + num_prompt_tokens
    inputs = StageInput(position_ids=torch.arange(num_tokens)[None], input_ids=IDS, num_prompt_tokens=num_prompt_tokens)
    return stage.head(stage.forward(inputs))


def attach_and_train(stage, config):
    """One step, and what the adapted stage gives after it."""
    method = METHODS[config.type](stage, config, seed=5)
    optimizer = StageOptimizer(method.parameters, TrainingConfig(lr=0.1), total_steps=2)
    logits(stage, method.num_prompt_tokens).square().sum().backward()
    gradients = {p.name: sum(use.grad for _, use in p.uses if use.grad is not None) for p in method.parameters}
    optimizer.apply(0, gradients, 1.0)
    return logits(stage, method.num_prompt_tokens).detach()


@pytest.mark.parametrize(("method", "case"), CASES)
def test_stage_that_any_method_was_trained_on_is_put_back_to_the_bit_or_given_up(model_dirs, method, case):
    stage = stage_of(model_dirs["llama"])
    before = logits(stage)
    modules = [name for name, _ in stage.model.named_modules()]
    resident = ResidentStage(stage, "key")
    config = CONFIGS[method][case]
    trained = attach_and_train(stage, config)
    assert not torch.equal(trained[:, -IDS.shape[1] :], before)

    if not resident.restore():
        assert config.trains_weights and stage.model.get_submodule("lm_head").weight.requires_grad
        return

    assert [name for name, _ in stage.model.named_modules()] == modules
    assert torch.equal(logits(stage), before)
    assert torch.equal(attach_and_train(stage, config), trained)


@pytest.mark.parametrize("scheme", ["none", "nf4"])
def test_one_stage_serves_different_methods_in_turn_with_the_bits_of_a_fresh_one(model_dirs, scheme):
    configs = [CONFIGS["lora"]["all_linear"], CONFIGS["prompt"]["vocabulary"], CONFIGS["adapters"]["houlsby"]]
    if scheme == "none":
        configs.insert(0, EVERYTHING)
    stage = stage_of(model_dirs["llama"], scheme)
    resident = ResidentStage(stage, "key")
    for config in configs:
        found = attach_and_train(stage, config)
        assert torch.equal(found, attach_and_train(stage_of(model_dirs["llama"], scheme), config))
        assert resident.restore()


def test_stage_whose_frozen_weight_was_changed_is_given_up(model_dirs):
    stage = stage_of(model_dirs["llama"])
    resident = ResidentStage(stage, "key")
    assert resident.restore()
    with torch.no_grad():
        stage.model.get_submodule("lm_head").weight.add_(1e-3)
    assert not resident.restore()
