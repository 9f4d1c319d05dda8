"""Side networks with fewer heads of the model's own width: what they start from, step 0, splits, bills, refusals."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from edge_node.methods.parallel_adapters import attach_parallel_adapters
from partitioner.activations import saved_block_bytes
from partitioner.adapter import adapter_params_of
from partitioner.model import JobShape
from plutino.errors import ConfigError
from plutino.job.method import ParallelAdaptersConfig
from plutino.load_adapter import load_adapter
from tests.numerics.chain import build_chain, make_batch
from tests.numerics.test_pac_side import attach, gradients, move, publish, run, stage_input, state_of
from tests.numerics.tiny_families import CONFIGS, describe_folder, save_model

WHOLE = ParallelAdaptersConfig(reduction=2, heads="whole")


@pytest.mark.parametrize("name", ["llama", "qwen3", "olmo2"])
def test_starts_as_the_base_splits_exactly_and_is_loaded_by_plain_transformers(name, tmp_path):
    folder = save_model(name, tmp_path / "base")
    batch = make_batch("right", family=CONFIGS[name][0])
    whole, split = (build_chain(folder, n, attention=None) for n in (1, 3))
    with torch.no_grad():
        base = whole[0].head(whole[0].forward(stage_input(batch)))
    methods, split_methods = attach(whole, WHOLE), attach(split, WHOLE)
    start = state_of(methods)
    assert all(torch.equal(state_of(split_methods)[key], value) for key, value in start.items())
    with torch.no_grad():
        assert torch.equal(run(whole, batch)[0], base)
        assert torch.equal(run(split, batch)[0], base)

    values = move(methods)
    for method in split_methods:
        method.load(values)
    logits, found = gradients(whole, methods, batch)
    split_logits, split_found = gradients(split, split_methods, batch)

    assert torch.equal(split_logits, logits)
    assert all(torch.equal(split_found[key], gradient) for key, gradient in found.items())
    publish(values, methods[0], tmp_path / "adapter")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    load_adapter(model, tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(model(**batch.model_inputs).logits, logits, rtol=1e-5, atol=1e-5)
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
    folder, kept = save_model(name, tmp_path), []
    batch = make_batch("right", family=CONFIGS[name][0])
    for blocks in ((1, 2), (1, 2, 3)):
        (stage,) = build_chain(folder, 1, attention=None)
        attach([stage], WHOLE.model_copy(update={"blocks": blocks}))
        own = {p.untyped_storage().data_ptr() for p in [*stage.model.parameters(), *stage.side.parameters()]}
        saved = {}

        def pack(tensor, saved=saved, own=own):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                saved[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address comes twice
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            stage.run(stage_input(batch))
        kept.append(sum(num_bytes for num_bytes, _ in saved.values()))
    table = describe_folder(folder)
    fields = adapter_params_of(table, WHOLE).shape_fields
    shape = JobShape(dtype="fp32", batch_rows=2, micro_batch_rows=2, row_tokens=9, label_tokens=1, **fields)

    assert 1.0 <= saved_block_bytes(table, shape, 3) / (kept[1] - kept[0]) <= 1.35


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
