"""Bottleneck adapters against their formula on the whole transformers model, and the loader that others use."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional
from transformers import AutoModelForCausalLM

from edge_node.methods.adapters import attach_adapters
from plutino.errors import ConfigError
from plutino.families import FAMILIES
from plutino.job.method import AdaptersConfig
from plutino.load_adapter import load_adapter
from tests.numerics.chain import build_chain, make_batch, run_chain
from tests.numerics.tiny_families import CONFIGS as FAMILY_CONFIGS
from tests.numerics.tiny_families import save_model

WITHOUT_MLP_LAYER = {"qwen3_moe"}


def moved(state, seed=11):
    generator = torch.Generator().manual_seed(seed)
    return {name: value + 0.2 * torch.randn(value.shape, generator=generator) for name, value in sorted(state.items())}


def by_formula(model, values, layers):
    """Independent of plutino's module: y + W_up relu(W_down y + b_down) + b_up on each layer's output."""
    leaves = {name: value.clone().requires_grad_(True) for name, value in values.items()}

    def hook(layer):
        down, down_bias, up, up_bias = (
            leaves[f"base_model.model.{layer}.adapter_{key}"]
            for key in ("down.weight", "down.bias", "up.weight", "up.bias")
        )

        def adapt(module, args, y):
            return y + torch.relu(y @ down.T + down_bias) @ up.T + up_bias

        return adapt

    for layer in layers:
        model.get_submodule(layer).register_forward_hook(hook(layer))
    return leaves


def loss_of(logits, batch):
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch.input_ids[:, 1:].flatten(), reduction="sum")


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_outputs_and_first_gradients_are_those_of_the_formula_on_the_whole_model(model_dirs, model, placement):
    batch = make_batch("right")
    stages = build_chain(model_dirs[model], 3)
    methods = [attach_adapters(stage, AdaptersConfig(bottleneck=5, placement=placement), seed=1) for stage in stages]
    values = moved({name: value for method in methods for name, value in method.state().items()})
    for method in methods:
        method.load(values)
    whole = AutoModelForCausalLM.from_pretrained(model_dirs[model], dtype=torch.float32).eval().requires_grad_(False)
    leaves = by_formula(whole, values, methods[0].peft_config()["layers"])

    logits, finish = run_chain(stages, batch)
    loss_of(logits, batch).backward()
    finish()
    expected = whole(**batch.model_inputs).logits
    loss_of(expected, batch).backward()

    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    gradients = {p.name: p.uses[0][1].grad for method in methods for p in method.parameters}
    assert len(gradients) == len(leaves) == (2 if placement == "houlsby" else 1) * 4 * 4
    for name, gradient in gradients.items():
        scale = float(leaves[name].grad.abs().max())
        torch.testing.assert_close(gradient, leaves[name].grad, rtol=1e-5, atol=1e-5 * max(1.0, scale))


@pytest.mark.parametrize("name", sorted(FAMILY_CONFIGS.keys() & FAMILIES.keys()))
def test_every_family_with_an_mlp_layer_takes_them_and_starts_as_the_base(name, tmp_path):
    folder = save_model(name, tmp_path)
    config = AdaptersConfig(bottleneck=3, placement="houlsby")
    (stage,) = build_chain(folder, 1, attention=None)
    if name in WITHOUT_MLP_LAYER:
        with pytest.raises(ConfigError, match="experts share one tensor"):
            attach_adapters(stage, config, seed=0)
        return
    batch = make_batch("full", family=FAMILY_CONFIGS[name][0])
    with torch.no_grad():
        before, _ = run_chain([stage], batch)
        method = attach_adapters(stage, config, seed=0)
        assert len(method.parameters) == 4 * 2 * 4
        assert torch.equal(run_chain([stage], batch)[0], before)
        method.load(moved(method.state()))
        assert not torch.equal(run_chain([stage], batch)[0], before)


@pytest.fixture
def published(model_dirs, tmp_path):
    """A folder with an adapter, and the chain that it came from."""
    stages = build_chain(model_dirs["llama"], 2)
    methods = [attach_adapters(stage, AdaptersConfig(bottleneck=5), seed=1) for stage in stages]
    values = moved({name: value for method in methods for name, value in method.state().items()})
    for method in methods:
        method.load(values)
    save_file(values, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(methods[0].peft_config()))
    return tmp_path, stages


@torch.no_grad()
def test_loader_gives_the_pipelines_outputs_bit_for_bit_and_the_base_when_disabled(model_dirs, published):
    folder, stages = published
    batch = make_batch("right")
    model = AutoModelForCausalLM.from_pretrained(model_dirs["llama"], dtype=torch.float32).eval()
    base = model(**batch.model_inputs).logits

    loaded = load_adapter(model, folder)

    adapted = model(**batch.model_inputs).logits
    assert torch.equal(adapted, run_chain(stages, batch)[0]) and not torch.equal(adapted, base)
    with loaded.disable_adapter():
        assert torch.equal(model(**batch.model_inputs).logits, base)
    assert torch.equal(model(**batch.model_inputs).logits, adapted)


def test_loader_refuses_another_model_and_tensors_that_do_not_fit(model_dirs, published):
    folder, _ = published
    with pytest.raises(ConfigError, match="the model lacks 4 of the 4 layers"):
        load_adapter(AutoModelForCausalLM.from_pretrained(model_dirs["gpt2"]), folder)
    save_file({"x": torch.zeros(1)}, folder / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match=r"tensors and adapter_config\.json disagree"):
        load_adapter(AutoModelForCausalLM.from_pretrained(model_dirs["llama"]), folder)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ConfigError, match="holds no bottleneck adapter"):
        load_adapter(AutoModelForCausalLM.from_pretrained(model_dirs["llama"]), folder)
