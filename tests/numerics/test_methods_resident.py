"""A stage is put back, whatever method hung on it: the next job gets the bits of a stage that was loaded anew."""

from __future__ import annotations

import pytest
import torch

from edge_node.engine.executor import StageExecutor
from edge_node.engine.optimizer import StageOptimizer
from edge_node.engine.unit import UnitInput
from edge_node.methods.registry import METHODS
from edge_node.objectives.sft import SftObjective
from edge_node.stage.build import build_stage
from edge_node.stage.passes import StageInput
from edge_node.stage.resident import ResidentStage
from edge_node.stage.weights import LocalSource
from edge_node.transport.base import Peer
from plutino.job.assignment import StageShape
from plutino.job.method import LoraConfig
from plutino.job.model import ModelConfig, packing_of
from plutino.job.training import TrainingConfig
from plutino.types import Unit, UnitKind
from tests.numerics.method_cases import CASES, CONFIGS
from tests.numerics.pipelines import make_rows

EVERYTHING = LoraConfig(rank=3, use_dora=True, dropout=0.1, modules_to_save=("lm_head", "embed_tokens"))
IDS = torch.arange(2, 12)[None]


def stage_of(model_dir, scheme="none"):
    packing = packing_of(ModelConfig(path=str(model_dir)), scheme)
    return build_stage(LocalSource(model_dir), 0, 4, dtype=torch.float32, packing=packing, checkpointing=True)


def logits(stage):
    inputs = StageInput(position_ids=torch.arange(IDS.shape[1])[None], input_ids=IDS)
    return stage.head(stage.forward(inputs))


def attach_and_train(stage, config):
    """One step on a stage that holds the whole model: the losses before and after it, and the gradients' norms."""
    method = METHODS[config.type](stage, config, seed=5)
    executor = StageExecutor(
        stage=stage,
        method=method,
        objective=SftObjective(),
        optimizer=StageOptimizer(method.parameters, TrainingConfig(lr=0.1), total_steps=2),
        transport=None,
        stages=(StageShape(start_block=0, end_block=4),),
        me=Peer(0, 0),
        seed=5,
    )
    rows = make_rows(1)
    weight = float(rows.label_mask.sum())
    outcome = executor.train_step(UnitInput(Unit(UnitKind.TRAIN, 0), 1, weight, (rows,)))
    executor.commit(0, 1.0)
    after = executor.evaluate(UnitInput(Unit(UnitKind.EVALUATE, 1), 1, weight, (rows,)))
    return outcome.loss_sum, after, outcome.squared_norms


@pytest.mark.parametrize(("method", "case"), CASES)
def test_stage_that_any_method_was_trained_on_is_put_back_to_the_bit_or_given_up(model_dirs, method, case):
    stage = stage_of(model_dirs["llama"])
    before = logits(stage)
    modules = [name for name, _ in stage.model.named_modules()]
    resident = ResidentStage(stage, "key")
    config = CONFIGS[method][case]
    trained = attach_and_train(stage, config)
    assert trained[0] != trained[1]

    if not resident.restore():
        assert config.trains_weights and stage.model.get_submodule("lm_head").weight.requires_grad
        return

    assert [name for name, _ in stage.model.named_modules()] == modules
    assert torch.equal(logits(stage), before)
    assert attach_and_train(stage, config) == trained


@pytest.mark.parametrize("scheme", ["none", "nf4"])
def test_one_stage_serves_different_methods_in_turn_with_the_bits_of_a_fresh_one(model_dirs, scheme):
    configs = [CONFIGS["lora"]["all_linear"], CONFIGS["prompt"]["vocabulary"], CONFIGS["adapters"]["houlsby"]]
    if scheme == "none":
        configs.insert(0, EVERYTHING)
    stage = stage_of(model_dirs["llama"], scheme)
    resident = ResidentStage(stage, "key")
    for config in configs:
        assert attach_and_train(stage, config) == attach_and_train(stage_of(model_dirs["llama"], scheme), config)
        assert resident.restore()


def test_stage_whose_frozen_weight_was_changed_is_given_up(model_dirs):
    stage = stage_of(model_dirs["llama"])
    resident = ResidentStage(stage, "key")
    assert resident.restore()
    with torch.no_grad():
        stage.model.get_submodule("lm_head").weight.add_(1e-3)
    assert not resident.restore()
