"""Side networks with fewer heads of the model's own width: what they start from, step 0, splits, bills, refusals."""

from __future__ import annotations

import pytest
import torch

from edge_node.methods.parallel_adapters import attach_parallel_adapters
from partitioner.adapter import adapter_params_of
from plutino.errors import ConfigError
from plutino.job.method import ParallelAdaptersConfig
from tests.numerics.chain import build_chain, make_batch
from tests.numerics.side_networks import attach, billed_over_kept, check_start_split_and_loading, stage_input, state_of
from tests.numerics.tiny_families import CONFIGS, describe_folder, save_model

WHOLE = ParallelAdaptersConfig(reduction=2, heads="whole")


@pytest.mark.parametrize("name", ["llama", "qwen3", "olmo2"])
def test_starts_as_the_base_splits_exactly_and_is_loaded_by_plain_transformers(name, tmp_path):
    folder = save_model(name, tmp_path / "base")
    batch = make_batch("right", family=CONFIGS[name][0])

    values = check_start_split_and_loading(folder, batch, WHOLE, tmp_path / "adapter")

    assert adapter_params_of(describe_folder(folder), WHOLE).num_params == sum(v.numel() for v in values.values())


@pytest.mark.parametrize("init", ["pruning", "fisher"])
def test_a_key_head_is_kept_with_all_its_queries_and_no_other(init, model_dirs):
    (stage,) = build_chain(model_dirs["llama"], 1)
    config = WHOLE.model_copy(update={"init": init})
    (method,) = attach([stage], config)
    if init == "fisher":
        assert stage.gradient_start is not None
        with stage.gradient_start.watching():
            output = stage.head(stage.forward(stage_input(make_batch("full"))))
            output.square().sum().backward()
        stage.gradient_start.finish()
    sizes, own = stage.config, state_of([method])
    per_key = sizes.num_attention_heads // sizes.num_key_value_heads
    for index in range(sizes.num_hidden_layers):
        attention = stage.model.get_submodule(f"model.layers.{index}.self_attn")
        columns = own[f"side.down.{index}.weight"].argmax(dim=1)
        kept = {
            name: [
                head
                for head, rows in enumerate(attention.get_submodule(name).weight.split(heads * sizes.head_dim))
                if torch.equal(rows[:, columns], own[f"side.blocks.{index}.self_attn.{name}.weight"])
            ]
            for name, heads in (("q_proj", per_key), ("k_proj", 1), ("v_proj", 1))
        }
        assert len(kept["k_proj"]) == 1
        assert kept["q_proj"] == kept["k_proj"] == kept["v_proj"]


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_planner_counts_what_a_side_block_keeps(name, tmp_path):
    batch = make_batch("right", family=CONFIGS[name][0])

    assert 1.0 <= billed_over_kept(save_model(name, tmp_path), batch, WHOLE) <= 1.35


@pytest.mark.parametrize(
    ("name", "reduction", "reason"),
    [
        ("gpt2", 2, "whole is not done for gpt2, which makes queries and keys in one layer"),
        ("llama", 4, r"number of key heads 2 .* choose one of 2"),
    ],
)
def test_heads_that_cannot_be_fewer_are_refused_with_the_reason(name, reduction, reason, tmp_path):
    (stage,) = build_chain(save_model(name, tmp_path), 1, attention=None)

    with pytest.raises(ConfigError, match=reason):
        attach_parallel_adapters(stage, ParallelAdaptersConfig(reduction=reduction, heads="whole"), seed=0)
