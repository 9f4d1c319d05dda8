"""Parallel adapters: the side network against its formula, step 0, what it leaves alone, and what others load."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from edge_node.engine.generate import GenerateOptions
from edge_node.methods.parallel_adapters import attach_parallel_adapters
from edge_node.transport.base import MessageKind, Peer
from plutino.errors import ConfigError
from plutino.job.method import ParallelAdaptersConfig
from plutino.load_adapter import load_adapter
from tests.numerics.chain import build_chain, make_batch
from tests.numerics.method_cases import CONFIGS as METHOD_CONFIGS
from tests.numerics.pipelines import make_batches, make_rows, make_spec, pipeline_of, stages_of, train
from tests.numerics.side_networks import (
    SMALL,
    attach,
    billed_over_kept,
    check_start_split_and_loading,
    gradients,
    loss_of,
    move,
    publish,
)
from tests.numerics.tiny_families import CONFIGS, save_model
from tests.sampling import sampled

# A quarter of a head's numbers is rotated there: of 16 a pair is left.
WIDER = {name: {"hidden_size": 64} for name in ("gpt_neox", "gpt_neox_sequential")}


def ladder_by_formula(model, layout, values, batch):
    """The published equations on plain transformers blocks: a = f(g a + (1 - g) W b), logits of b_L + W_up norm(a)."""
    narrow = LlamaForCausalLM(LlamaConfig(**layout["config"])).eval()
    side_blocks = {f"side.blocks.{i}.{n}" for i in range(4) for n, _ in narrow.model.layers[i].named_parameters()}
    assert side_blocks <= values.keys()
    leaves = {name: value.clone().requires_grad_(True) for name, value in values.items()}
    with torch.no_grad():
        output = model.model(input_ids=batch.input_ids, position_ids=batch.position_ids, output_hidden_states=True)
        recorded = {}
        hook = model.model.layers[3].register_forward_hook(lambda module, args, out: recorded.setdefault("last", out))
        model.model(input_ids=batch.input_ids, position_ids=batch.position_ids)
        hook.remove()
    last = recorded["last"][0] if isinstance(recorded["last"], tuple) else recorded["last"]
    outputs = [*output.hidden_states[1:4], last]
    a = functional.linear(output.hidden_states[0], leaves["side.entry.weight"], leaves["side.entry.bias"])
    angles = narrow.model.rotary_emb(a, batch.position_ids)
    for i, b in enumerate(outputs):
        gate = torch.sigmoid(leaves[f"side.gate.{i}"] / 0.1)
        a = gate * a + (1 - gate) * functional.linear(b, leaves[f"side.down.{i}.weight"], leaves[f"side.down.{i}.bias"])
        own = {n: leaves[f"side.blocks.{i}.{n}"] for n, _ in narrow.model.layers[i].named_parameters()}
        a = torch.func.functional_call(narrow.model.layers[i], own, (a,), {"position_embeddings": angles})
        a = a[0] if isinstance(a, tuple) else a
    normed = torch.func.functional_call(narrow.model.norm, {"weight": leaves["side.norm.weight"]}, (a,))
    up = functional.linear(normed, leaves["side.up.weight"], leaves["side.up.bias"])
    return model.lm_head(output.last_hidden_state + up), leaves


def test_outputs_and_gradients_are_those_of_the_published_equations(model_dirs):
    batch = make_batch("full")
    stages = build_chain(model_dirs["llama"], 3)
    methods = attach(stages)
    values = move(methods)
    model = AutoModelForCausalLM.from_pretrained(model_dirs["llama"], dtype=torch.float32).eval().requires_grad_(False)

    logits, found = gradients(stages, methods, batch)
    expected, leaves = ladder_by_formula(model, methods[0].peft_config(), values, batch)
    loss_of(expected, batch).backward()

    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert found.keys() == leaves.keys()
    for name, gradient in found.items():
        scale = float(leaves[name].grad.abs().max())
        torch.testing.assert_close(gradient, leaves[name].grad, rtol=1e-5, atol=1e-5 * max(1.0, scale))


@pytest.mark.parametrize(
    "name", sampled(sorted(CONFIGS.keys() - {"qwen3_moe"}), 6, always=("gpt_neox", "opt_projected"))
)
def test_every_family_starts_as_the_base_splits_exactly_and_is_loaded_by_others(name, tmp_path):
    folder = save_model(name, tmp_path / "base", **WIDER.get(name, {}))

    check_start_split_and_loading(folder, make_batch("right", family=CONFIGS[name][0]), SMALL, tmp_path / "adapter")


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_loaded_side_network_generates_the_pipelines_tokens_with_its_kv_cache(model_dirs, tmp_path, model):
    spec = make_spec(model_dirs[model]).model_copy(update={"method": SMALL})
    prompts = make_rows(100, 3, num_tokens=6)
    with pipeline_of(spec, stages_of(3)) as pipeline:
        methods = [executor.method for executor in pipeline.executors.values()]
        values = move(methods)
        expected = pipeline.generate(0, [prompts], GenerateOptions(max_new_tokens=5, stop_tokens=()))
        publish(values, methods[0], tmp_path / "adapter")
    whole = AutoModelForCausalLM.from_pretrained(model_dirs[model], dtype=torch.float32).eval()
    load_adapter(whole, tmp_path / "adapter")

    start, found = 0, []
    for length in prompts.lengths.tolist():
        ids = torch.from_numpy(prompts.input_ids[start : start + length]).long()[None]
        start += length
        # Two beams move the cache's rows about, the side blocks' layers with them.
        whole.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, num_beams=2, do_sample=False)
        tokens = whole.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
        found.append(tokens[0, length:].tolist())
    assert found == expected[0]


def test_only_the_narrow_side_gradient_goes_back_and_nothing_below_the_first_chosen_block(model_dirs):
    method = METHOD_CONFIGS["parallel_adapters"]["blocks"]  # blocks 1 and 3: the first of three stages holds neither
    spec = make_spec(model_dirs["llama"]).model_copy(update={"method": method})
    batch = make_batches(num_steps=1)[0]
    sent = {}
    with pipeline_of(spec, stages_of(3)) as pipeline:
        for me, executor in pipeline.executors.items():
            record_sends(executor.transport, me, sent)
        train(pipeline, [batch])
        assert not pipeline.executors[Peer(0)].method.parameters

    tokens = [len(rows.lengths) * rows.padded_tokens for rows in batch.rows]
    forward = {me: [num for kind, num in entries if kind == MessageKind.FORWARD] for me, entries in sent.items()}
    backward = {me: [num for kind, num in entries if kind == MessageKind.BACKWARD] for me, entries in sent.items()}
    width, side_width = 32, 16
    assert forward[Peer(0)] == [4 * n * width for n in tokens]
    assert forward[Peer(1)] == [4 * n * (width + side_width) for n in tokens]
    assert backward[Peer(2)] == [4 * n * side_width for n in tokens]
    assert backward[Peer(1)] == []


def record_sends(transport, me, sent):
    send, sent[me] = transport.send, []

    def recording(peer, key, tensors, **options):
        floats = [tensor for tensor in tensors.values() if tensor.is_floating_point()]
        sent[me].append((key.kind, sum(tensor.nbytes for tensor in floats)))
        return send(peer, key, tensors, **options)

    transport.send = recording


@pytest.mark.parametrize(
    ("name", "config", "reason"),
    [
        ("qwen3_moe", SMALL, "qwen3_moe has mixtures of experts"),
        ("llama", ParallelAdaptersConfig(reduction=3), "choose one of 2, 4, 8"),
        ("llama", ParallelAdaptersConfig(reduction=8), "leaves heads of 1 numbers"),
        ("llama", ParallelAdaptersConfig(reduction=2, blocks=(1, 4)), r"blocks is \[1, 4\] but the blocks are 0 to 3"),
    ],
)
def test_what_cannot_be_narrowed_is_refused_with_the_reason(name, config, reason, tmp_path):
    folder = save_model(name, tmp_path)
    (stage,) = build_chain(folder, 1, attention=None)

    with pytest.raises(ConfigError, match=reason):
        attach_parallel_adapters(stage, config, seed=0)


def test_published_side_network_is_refused_by_another_model_and_when_a_tensor_is_gone(model_dirs, tmp_path):
    (stage,) = build_chain(model_dirs["llama"], 1)
    (method,) = attach([stage])
    publish({k: v for k, v in method.state().items() if k != "side.gate.2"}, method, tmp_path / "adapter")
    other = save_model("llama", tmp_path / "other", hidden_size=64)

    whole = AutoModelForCausalLM.from_pretrained(model_dirs["llama"], dtype=torch.float32)
    with pytest.raises(ConfigError, match=r"disagree, first about side\.gate\.2"):
        load_adapter(whole, tmp_path / "adapter")
    with pytest.raises(ConfigError, match="4 blocks of hidden size 64"):
        load_adapter(AutoModelForCausalLM.from_pretrained(other), tmp_path / "adapter")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text"])
def test_planner_counts_what_a_side_block_keeps_and_no_byte_of_the_backbones(name, dtype, tmp_path):
    folder = save_model(name, tmp_path)

    assert 1.0 <= billed_over_kept(folder, make_batch("right", family=CONFIGS[name][0]), SMALL, dtype) <= 1.35
