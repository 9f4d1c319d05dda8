"""Top-down unfreezing: what is frozen stays as it is, and neither the partition nor a restart changes a bit."""

from __future__ import annotations

import pytest
import torch

from edge_node.engine.freezing import block_of_use
from edge_node.transport.base import Peer
from plutino.errors import ConfigError
from plutino.families import family_of
from plutino.job.method import AdaptersConfig, FullConfig, LoraConfig
from plutino.job.method_part import Unfreezing
from plutino.job.spec import parse_spec
from tests.numerics.pipelines import (
    assert_same_tensors,
    make_batches,
    make_spec,
    pipeline_of,
    run_step,
    stages_of,
    train,
)

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

EVERY_STEP = Unfreezing(every_steps=1)
METHODS = {
    "adapters": ("llama", AdaptersConfig(bottleneck=4, placement="houlsby", unfreeze=EVERY_STEP)),
    "full": ("gpt2", FullConfig(unfreeze=EVERY_STEP)),
    "lora": (
        "llama",
        LoraConfig(rank=3, dropout=0.1, unfreeze=EVERY_STEP, modules_to_save=("lm_head", "embed_tokens")),
    ),
}


def spec_of(model_dirs, method):
    model, config = METHODS[method]
    return make_spec(model_dirs[model], training={"weight_decay": 0.1}).model_copy(update={"method": config})


def without_schedule(spec):
    return spec.model_copy(update={"method": spec.method.model_copy(update={"unfreeze": None})})


@pytest.mark.parametrize("method", METHODS)
def test_partition_recomputation_and_a_restart_change_no_bit(model_dirs, method):
    spec, batches = spec_of(model_dirs, method), make_batches(4)
    with pipeline_of(spec, stages_of(1)) as pipeline:
        decisions = train(pipeline, batches)
        state = pipeline.state()
    with pipeline_of(spec, stages_of(3), checkpointing=True) as pipeline:
        assert train(pipeline, batches[:2]) == decisions[:2]
        snapshot = pipeline.snapshot()
    with pipeline_of(spec, stages_of(2)) as pipeline:
        pipeline.restore(snapshot)
        assert train(pipeline, batches[2:], first_step=2) == decisions[2:]
        assert_same_tensors(pipeline.state(), state)


@pytest.mark.parametrize("method", METHODS)
def test_frozen_parameters_keep_value_and_moments_and_the_others_have_the_usual_gradient(model_dirs, method):
    spec, batch = spec_of(model_dirs, method), make_batches()[0]
    with pipeline_of(without_schedule(spec), stages_of(3)) as pipeline:
        pipeline.train_step(0, batch.rows, batch.loss_weight)
        usual = {name: g.clone() for e in pipeline.executors.values() for name, g in e._gradients.items()}
    with pipeline_of(spec, stages_of(3)) as pipeline:
        start = pipeline.snapshot()
        family = pipeline.executors[Peer(0)].stage.family
        for step in range(4):
            before = pipeline.snapshot()
            outcomes = pipeline.train_step(step, batch.rows, batch.loss_weight)
            gradients = {n: g.clone() for e in pipeline.executors.values() for n, g in e._gradients.items()}
            frozen = {
                p.name
                for e in pipeline.executors.values()
                for p in e.method.parameters
                if all((b := block_of_use(p.name, r, family)) is not None and b < 3 - step for r in p.all_roles)
            }
            assert gradients.keys() == usual.keys() - frozen
            assert bool(frozen) == (step < 3)
            voted = {
                p.name: norm
                for me, outcome in outcomes.items()
                for p, norm in zip(pipeline.executors[me].method.parameters, outcome.squared_norms, strict=True)
            }
            # A new adapter's first gradients are zero here and there, frozen or not.
            assert all(voted[name] == 0.0 for name in frozen) and any(voted.values())
            if step == 0:
                # The tied table's gradient is its head's alone as long as the embedding is frozen.
                tied = {
                    p.name for e in pipeline.executors.values() for p in e.method.parameters if len(p.all_roles) > 1
                }
                assert_same_tensors(
                    gradients,
                    {name: usual[name] for name in gradients.keys() - tied} | {name: gradients[name] for name in tied},
                )
            pipeline.commit(step, 1.0)
            after = pipeline.snapshot()
            for key, value in after.items():
                kind, _, name = key.partition("/")
                if name in frozen:
                    assert torch.equal(value, start[key]), key
                elif kind == "adam_step":
                    assert value == before[key] + 1, key


def test_stages_below_the_lowest_unfrozen_block_send_and_run_nothing_backward(model_dirs, monkeypatch):
    ran = []
    spec, batches = spec_of(model_dirs, "lora"), make_batches(4)
    with pipeline_of(spec, stages_of(4)) as pipeline:
        for me, executor in pipeline.executors.items():
            gradients = executor._step_gradients
            end = gradients.end_pass
            monkeypatch.setattr(gradients, "end_pass", lambda m, me=me, end=end: ran.append(me.stage_index) or end(m))
        seen = []
        for step, batch in enumerate(batches):
            ran.clear()
            run_step(pipeline, step, batch)
            seen.append(set(ran))
    assert seen == [{3}, {2, 3}, {1, 2, 3}, {0, 1, 2, 3}]


@pytest.mark.parametrize(
    ("step", "every_steps", "blocks", "lowest"), [(0, 5, 1, 7), (4, 5, 1, 7), (5, 5, 1, 6), (5, 5, 3, 2), (99, 5, 3, 0)]
)
def test_lowest_block_follows_from_the_step(step, every_steps, blocks, lowest):
    assert Unfreezing(every_steps=every_steps, blocks=blocks).lowest_block(step, 8) == lowest


@pytest.mark.parametrize(
    ("name", "role", "block"),
    [
        ("base_model.model.model.layers.12.mlp.up_proj.lora_A.weight", "block", 12),
        ("model.layers.3.input_layernorm.weight", "block", 3),
        ("model.norm.weight", "block", None),
        ("base_model.model.lm_head.weight", "head", None),
        ("model.embed_tokens.weight", "embedding", 0),
        ("base_model.model.score.weight", "head", None),
        ("prefix.embedding.weight", "block 5", 5),
    ],
)
def test_block_with_which_a_parameter_is_unfrozen(name, role, block):
    assert block_of_use(name, role, family_of("llama")) == block


def test_learned_positions_are_unfrozen_with_the_lowest_block():
    assert block_of_use("transformer.wpe.weight", "block", family_of("gpt2")) == 0


def test_schedule_is_part_of_the_job_file_and_refused_beside_chosen_layers(tmp_path):
    values = {"model": "m", "data": {"train": "t"}}
    method = {"type": "lora", "unfreeze": {"every_steps": 10, "blocks": 2}}
    spec = parse_spec({**values, "method": method}, base_dir=tmp_path)
    assert spec.method.unfreezing == Unfreezing(every_steps=10, blocks=2)
    with pytest.raises(ConfigError, match="counts all blocks from the top"):
        parse_spec({**values, "method": {**method, "blocks": [1]}}, base_dir=tmp_path)
