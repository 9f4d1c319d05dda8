from __future__ import annotations

import json
from functools import reduce
from operator import or_

import peft
import pytest
import torch
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from edge_node.methods.dropout import SeededDropout, dropout_position
from edge_node.methods.lora import attach_lora
from plutino.errors import ConfigError
from plutino.job.method import LoraConfig
from tests.numerics.chain import build_chain, make_batch, run_chain
from tests.sampling import sampled

# peft itself calls what transformers has deprecated, and warns of untied copies, which the job spec allows.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]

# Few targets where the case is not about targets: wrapping layers is most of these tests' time.
FEW = {"llama": ("q_proj", "mlp.down_proj"), "gpt2": ("c_attn", "mlp.c_proj")}


def make_configs(**few) -> dict[str, LoraConfig]:
    return {
        "few": LoraConfig(rank=4, **few),
        "all_linear": LoraConfig(rank=4),
        "dora": LoraConfig(rank=4, use_dora=True, **few),
        "dropout": LoraConfig(rank=4, dropout=0.3, **few),
        "dora_dropout": LoraConfig(rank=4, dropout=0.3, use_dora=True, **few),
        "rslora": LoraConfig(rank=4, use_rslora=True, **few),
        "blocks": LoraConfig(rank=4, layers_to_transform=(1, 3), **few),
        "head": LoraConfig(rank=4, modules_to_save=("lm_head",), **few),
        "tied": LoraConfig(rank=4, modules_to_save=("lm_head",), ensure_weight_tying=True, **few),
    }


LLAMA = make_configs(target_modules=FEW["llama"]) | {
    "patterns": LoraConfig(
        rank=4, rank_pattern={"down_proj": 2, r"layers\.[23]\..*_proj": 3}, alpha_pattern={"up_proj": 3.5}
    ),
    "all_linear_blocks": LoraConfig(rank=4, layers_to_transform=(2,)),
    "both": LoraConfig(rank=4, modules_to_save=("embed_tokens", "lm_head"), target_modules=FEW["llama"]),
    "tied_by_embedding": LoraConfig(
        rank=4, modules_to_save=("embed_tokens",), ensure_weight_tying=True, target_modules=FEW["llama"]
    ),
}
CONFIGS: dict[str, dict[str, LoraConfig]] = {
    "llama": LLAMA,
    "tied_llama": LLAMA,
    "gpt2": make_configs(target_modules=FEW["gpt2"])
    | {"embedding": LoraConfig(rank=4, modules_to_save=("wte",), target_modules=FEW["gpt2"])},
}
CASES = [
    *(("llama", name) for name in ("all_linear", "patterns", "blocks", "all_linear_blocks", "rslora", "dora", "both")),
    *(("tied_llama", name) for name in ("head", "tied", "tied_by_embedding")),
    *(("gpt2", name) for name in ("all_linear", "dora", "embedding", "tied")),
]


def attach(stages, config, seed=7):
    return [attach_lora(stage, config, seed=seed) for stage in stages]


def joined(methods):
    return reduce(or_, (method.state() for method in methods))


def randomised(state, seed=11):
    """Values away from the start, so that B is not zero; both keys of a tied parameter keep one value."""
    generator = torch.Generator().manual_seed(seed)
    moved = {
        name: value + 0.05 * torch.randn(value.shape, generator=generator) for name, value in sorted(state.items())
    }
    return moved


def tie(state, config):
    names = sorted(name for name in state if "lora" not in name)
    return state | dict.fromkeys(names, state[names[0]]) if config.ensure_weight_tying else state


def stock_model(model_dir, config: LoraConfig, dtype=torch.float32):
    """The whole model under stock peft, built from the job's settings and not from ours."""
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype)
    targets = config.target_modules if config.target_modules == "all-linear" else list(config.target_modules)
    if config.layers_to_transform and targets == "all-linear":
        # peft refuses to combine the two.
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    stock = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=targets,
        layers_to_transform=list(config.layers_to_transform) if config.layers_to_transform else None,
        rank_pattern=dict(config.rank_pattern),
        alpha_pattern=dict(config.alpha_pattern),
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        modules_to_save=list(config.modules_to_save) or None,
        ensure_weight_tying=config.ensure_weight_tying,
        fan_in_fan_out=base.config.model_type == "gpt2",
    )
    return peft.get_peft_model(base, stock).eval()


def loss_of(logits, batch):
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch.input_ids[:, 1:].flatten(), reduction="sum")


def chain_gradients(stages, methods, batch, position=None):
    if position is None:
        logits, finish = run_chain(stages, batch)
        loss_of(logits, batch).backward()
        finish()
    else:
        with dropout_position(**position):
            logits, finish = run_chain(stages, batch)
        loss_of(logits, batch).backward()
        finish()
    gradients = {}
    for parameter in (p for method in methods for p in method.parameters):
        for _, use in parameter.uses:
            assert use.grad is not None, parameter.name
            gradients[parameter.name] = gradients.get(parameter.name, 0) + use.grad
    return gradients


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


@pytest.mark.parametrize("num_stages", [2, 3])
def test_initial_adapter_does_not_depend_on_the_partition(model_dirs, num_stages):
    whole = joined(attach(build_chain(model_dirs["llama"], 1), LLAMA["dora"]))

    parts = joined(attach(build_chain(model_dirs["llama"], num_stages), LLAMA["dora"]))

    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    other_seed = joined(attach(build_chain(model_dirs["llama"], 1), LLAMA["dora"], seed=8))
    assert not any(torch.equal(whole[name], other_seed[name]) for name in whole if "lora_A" in name)


def test_initial_values_are_pefts_kind(model_dirs):
    (method,) = attach(build_chain(model_dirs["llama"], 1), LLAMA["all_linear"])

    state = method.state()

    bound = 1 / 32**0.5
    q_proj = state["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]
    assert 0.8 * bound < q_proj.abs().max() <= bound
    assert all(not value.any() for name, value in state.items() if "lora_B" in name)


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


def test_stage_without_trainable_parameter_is_legal(model_dirs):
    stages = build_chain(model_dirs["llama"], 3)

    methods = attach(stages, LoraConfig(rank=2, layers_to_transform=(3,), rank_pattern={"q_proj": 3}))

    assert [len(method.parameters) for method in methods] == [0, 0, 14]
    assert methods[0].state() == {}
    chain_gradients(stages, methods, make_batch("right"))


def test_parameters_are_sorted_and_have_one_use_in_a_block(model_dirs):
    (method,) = attach(build_chain(model_dirs["llama"], 1), LLAMA["all_linear"])

    names = [parameter.name for parameter in method.parameters]

    assert names == sorted(names) and len(names) == len(set(names)) == 4 * 7 * 2
    assert all([role for role, _ in p.uses] == ["block"] and p.all_roles == ("block",) for p in method.parameters)


@pytest.mark.parametrize("model", ["tied_llama", "gpt2"])
def test_tied_parameter_has_two_uses_on_one_storage_where_one_stage_holds_both(model_dirs, model):
    (method,) = attach(build_chain(model_dirs[model], 1), CONFIGS[model]["tied"])

    (tied,) = [parameter for parameter in method.parameters if "lora" not in parameter.name]

    assert [role for role, _ in tied.uses] == ["embedding", "head"] == list(tied.all_roles)
    embedding, head = (use for _, use in tied.uses)
    assert embedding is not head and embedding.data_ptr() == head.data_ptr()


@pytest.mark.parametrize("model", ["tied_llama", "gpt2"])
def test_tied_parameter_has_one_name_on_the_stages_that_share_it(model_dirs, model):
    methods = attach(build_chain(model_dirs[model], 3), CONFIGS[model]["tied"])

    held = [[p for p in method.parameters if "lora" not in p.name] for method in methods]

    assert [len(parameters) for parameters in held] == [1, 0, 1]
    (first,), _, (last,) = held
    assert first.name == last.name and first.all_roles == last.all_roles == ("embedding", "head")
    assert [role for role, _ in (*first.uses, *last.uses)] == ["embedding", "head"]
    assert any(key.endswith("lm_head.weight") for key in methods[2].state())


@pytest.mark.parametrize("model", ["tied_llama", "gpt2"])
def test_tied_parameter_loads_from_either_key(model_dirs, model):
    methods = attach(build_chain(model_dirs[model], 2), CONFIGS[model]["tied"])
    state = joined(methods)
    (embedding_key, head_key) = sorted((key for key in state if "lora" not in key), key=lambda key: "lm_head" in key)
    value = torch.full_like(state.pop(embedding_key), 0.25)

    methods[0].load(state | {head_key: value})
    methods[1].load({key: item for key, item in state.items() if key != head_key} | {embedding_key: value})

    assert torch.equal(methods[0].state()[embedding_key], value)
    assert torch.equal(methods[1].state()[head_key], value)


def test_untied_copies_of_tied_embeddings_are_two_parameters(model_dirs):
    (method,) = attach(build_chain(model_dirs["tied_llama"], 1), LLAMA["both"])

    saved = [parameter for parameter in method.parameters if "lora" not in parameter.name]

    assert [parameter.all_roles for parameter in saved] == [("head",), ("embedding",)]
    assert len({use.data_ptr() for parameter in saved for _, use in parameter.uses}) == 2


def test_load_is_strict_about_own_names_and_ignores_others(model_dirs):
    methods = attach(build_chain(model_dirs["llama"], 2), LLAMA["few"])
    before, values = methods[0].state(), randomised(joined(methods))
    name = methods[0].parameters[0].name

    with pytest.raises(ConfigError, match=f"{name} is missing"):
        methods[0].load({key: value for key, value in values.items() if key != name})
    with pytest.raises(ConfigError, match=r"has shape \[1\] instead of"):
        methods[0].load(values | {name: torch.zeros(1)})
    assert all(torch.equal(before[key], value) for key, value in methods[0].state().items())

    methods[0].load(values | {"somebody.else": torch.zeros(1)})
    assert torch.equal(methods[0].state()[name], values[name])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoraConfig(target_modules=("q_prj",)), "q_prj names no linear layer.*down_proj.*q_proj"),
        (LoraConfig(target_modules=("lm_head",)), "lm_head names no linear layer"),
        (LoraConfig(target_modules=()), "an empty list"),
        (LoraConfig(layers_to_transform=(1, 4)), "blocks are 0 to 3"),
        (LoraConfig(layers_to_transform=()), "blocks are 0 to 3"),
        (LoraConfig(rank_pattern={"q_prj": 4}), "rank_pattern: 'q_prj' matches"),
        (LoraConfig(layers_to_transform=(1,), alpha_pattern={r"2\.mlp\.up_proj": 4}), "alpha_pattern"),
        (LoraConfig(rank_pattern={"(": 4}), "no regular expression"),
        (LoraConfig(modules_to_save=("norm",)), "'norm' cannot be trained in full.*embed_tokens and lm_head"),
        (LoraConfig(modules_to_save=("lm_head",), ensure_weight_tying=True), "are not tied"),
    ],
)
def test_attach_refuses_what_the_model_does_not_have_on_every_stage(model_dirs, config, message):
    for stage in build_chain(model_dirs["llama"], 2):
        with pytest.raises(ConfigError, match=message):
            attach_lora(stage, config, seed=0)


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


def test_adapter_of_a_fresh_peft_model_has_the_stages_names(model_dirs):
    """The names come from peft's own function for state dicts, and not only from its files."""
    config = LLAMA["both"]
    stock = get_peft_model_state_dict(stock_model(model_dirs["llama"], config))

    assert joined(attach(build_chain(model_dirs["llama"], 3), config)).keys() == stock.keys()
