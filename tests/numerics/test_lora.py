"""LoRA over a chain of stages against the whole model under stock peft."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from tests.numerics.chain import build_chain, make_batch, run_chain
from tests.numerics.lora_cases import (
    CASES,
    CONFIGS,
    LLAMA,
    attach,
    chain_gradients,
    joined,
    loss_of,
    randomised,
    stock_model,
    tie,
)
from tests.sampling import sampled

# peft itself calls what transformers has deprecated, and warns of untied copies, which the job spec allows.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]


@pytest.mark.parametrize(
    ("model", "name", "num_stages"),
    sampled(
        [(*case, 3) for case in CASES]
        + [
            (model, name, n)
            for model, name in (("llama", "dora"), ("tied_llama", "tied"), ("gpt2", "all_linear"))
            for n in (1, 2)
        ],
        10,
        always=[("tied_llama", "tied", 3), ("llama", "patterns", 3), ("llama", "blocks", 3), ("llama", "dora", 2)],
    ),
)
def test_chain_gives_stock_pefts_logits_and_gradients_bit_for_bit(model_dirs, model, name, num_stages):
    config, batch = CONFIGS[model][name], make_batch("right")
    stages = build_chain(model_dirs[model], num_stages)
    methods = attach(stages, config)
    stock = stock_model(model_dirs[model], config)
    values = tie(randomised(joined(methods)), config)
    for method in methods:
        method.load(values)
    peft.set_peft_model_state_dict(stock, values)

    logits, _ = run_chain(stages, batch)
    gradients = chain_gradients(stages, methods, batch)

    expected = stock(**batch.model_inputs).logits
    loss_of(expected, batch).backward()
    assert torch.equal(logits, expected)
    stock_gradients = {
        key.replace(".default", "")
        .replace(".modules_to_save", "")
        .replace("magnitude_vector.weight", "magnitude_vector"): p.grad
        for key, p in stock.named_parameters()
        if p.requires_grad
    }
    assert gradients.keys() == stock_gradients.keys()
    differing = [name for name, gradient in gradients.items() if not torch.equal(gradient, stock_gradients[name])]
    if config.ensure_weight_tying:
        # Two uses added in another order than autograd adds them.
        for name in differing:
            torch.testing.assert_close(gradients[name], stock_gradients[name], rtol=0, atol=1e-5)
        differing = [name for name in differing if "lora" in name]
    assert not differing


@pytest.mark.parametrize("kind", ["full", "left", "packed"])
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_gradients_are_stock_pefts_bit_for_bit_for_every_padding(model_dirs, model, kind):
    config, batch = CONFIGS[model]["few"], make_batch(kind)
    stages = build_chain(model_dirs[model], 3)
    methods = attach(stages, config)
    stock = stock_model(model_dirs[model], config)
    values = randomised(joined(methods))
    for method in methods:
        method.load(values)
    peft.set_peft_model_state_dict(stock, values)

    gradients = chain_gradients(stages, methods, batch)

    loss_of(stock(**batch.model_inputs).logits, batch).backward()
    stock_gradients = {k.replace(".default", ""): p.grad for k, p in stock.named_parameters() if p.requires_grad}
    assert all(torch.equal(gradients[key], gradient) for key, gradient in stock_gradients.items())


@pytest.mark.parametrize(
    ("model", "name"), sampled(CASES, 7, always=[("tied_llama", "tied"), ("llama", "patterns")], seed=1)
)
@torch.no_grad()
def test_joined_states_are_the_adapter_that_stock_peft_saves_and_loads(model_dirs, tmp_path, model, name):
    config, batch = CONFIGS[model][name], make_batch("right")
    stages = build_chain(model_dirs[model], 2)
    methods = attach(stages, config)
    values = tie(randomised(joined(methods)), config)
    for method in methods:
        method.load(values)
    save_file(joined(methods), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(methods[0].peft_config()))

    stock_model(model_dirs[model], config).save_pretrained(tmp_path / "stock")
    base = AutoModelForCausalLM.from_pretrained(model_dirs[model], dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()

    with safe_open(tmp_path / "stock" / "adapter_model.safetensors", "pt") as stock:
        shapes = {key: stock.get_slice(key).get_shape() for key in stock.keys()}  # noqa: SIM118  # no mapping
    assert {key: list(value.shape) for key, value in values.items()} == shapes
    assert torch.equal(loaded(**batch.model_inputs).logits, run_chain(stages, batch)[0])
    assert methods[0].peft_config() == methods[1].peft_config()


@pytest.mark.parametrize("name", ["few", "all_linear", "patterns", "blocks", "rslora", "dora", "both"])
def test_peft_config_is_what_stock_peft_writes(model_dirs, tmp_path, name):
    config = LLAMA[name]
    (method,) = attach(build_chain(model_dirs["llama"], 1), config)
    stock_model(model_dirs["llama"], config).save_pretrained(tmp_path)

    ours, stock = method.peft_config(), json.loads((tmp_path / "adapter_config.json").read_text())

    for values in (ours, stock):
        values["target_modules"] = sorted(values["target_modules"])
        values["modules_to_save"] = sorted(values["modules_to_save"] or [])
    assert ours | {"base_model_name_or_path": stock["base_model_name_or_path"]} == stock


@pytest.mark.parametrize("name", ["few", "dora", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@torch.no_grad()
def test_disabled_adapter_is_exactly_the_base_model(model_dirs, name, dtype):
    batch = make_batch("right")
    base, _ = run_chain(build_chain(model_dirs["llama"], 2, dtype=dtype), batch)
    stages = build_chain(model_dirs["llama"], 2, dtype=dtype)
    methods = attach(stages, LLAMA[name])
    for method in methods:
        method.load(randomised(joined(methods)))
    adapted, _ = run_chain(stages, batch)

    for method in methods:
        method.set_enabled(False)
    disabled, _ = run_chain(stages, batch)
    for method in methods:
        method.set_enabled(True)

    assert torch.equal(disabled, base)
    assert not torch.equal(adapted, base)
    assert torch.equal(run_chain(stages, batch)[0], adapted)
    assert all(use.requires_grad for method in methods for p in method.parameters for _, use in p.uses)


@torch.no_grad()
def test_fresh_dora_on_a_bf16_base_is_exactly_the_base_model(model_dirs):
    """Norms rounded to bf16, as peft leaves them, move the fresh model away from its base."""
    batch = make_batch("right")
    base, _ = run_chain(build_chain(model_dirs["llama"], 2, dtype=torch.bfloat16), batch)
    stages = build_chain(model_dirs["llama"], 2, dtype=torch.bfloat16)
    attach(stages, LLAMA["dora"])

    assert torch.equal(run_chain(stages, batch)[0], base)


@pytest.mark.parametrize("name", ["few", "dora", "both"])
def test_bf16_base_trains_fp32_parameters(model_dirs, name):
    stages = build_chain(model_dirs["llama"], 2, dtype=torch.bfloat16)
    methods = attach(stages, LLAMA[name])

    gradients = chain_gradients(stages, methods, make_batch("right"))

    uses = [use for method in methods for parameter in method.parameters for _, use in parameter.uses]
    assert all(use.dtype == torch.float32 for use in uses)
    assert all(gradient.isfinite().all() and gradient.dtype == torch.float32 for gradient in gradients.values())


def test_adapter_of_a_fresh_peft_model_has_the_stages_names(model_dirs):
    """The names come from peft's own function for state dicts, and not only from its files."""
    config = LLAMA["both"]
    stock = get_peft_model_state_dict(stock_model(model_dirs["llama"], config))

    assert joined(attach(build_chain(model_dirs["llama"], 3), config)).keys() == stock.keys()
