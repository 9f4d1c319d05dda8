"""Which parameters a stage trains with LoRA, where they start, and what is refused."""

from __future__ import annotations

import pytest
import torch

from edge_node.methods.lora import attach_lora
from plutino.errors import ConfigError
from plutino.job.method import LoraConfig
from tests.numerics.chain import build_chain, make_batch
from tests.numerics.lora_cases import (
    CONFIGS,
    LLAMA,
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


def test_stage_without_trainable_parameter_is_legal(model_dirs):
    stages = build_chain(model_dirs["llama"], 3)

    methods = attach(stages, LoraConfig(rank=2, blocks=(3,), rank_pattern={"q_proj": 3}))

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
        (LoraConfig(blocks=(1, 4)), "blocks are 0 to 3"),
        (LoraConfig(blocks=()), "blocks are 0 to 3"),
        (LoraConfig(rank_pattern={"q_prj": 4}), "rank_pattern: 'q_prj' matches"),
        (LoraConfig(blocks=(1,), alpha_pattern={r"2\.mlp\.up_proj": 4}), "alpha_pattern"),
        (LoraConfig(rank_pattern={"(": 4}), "no regular expression"),
        (LoraConfig(modules_to_save=("norm",)), "'norm' cannot be trained in full.*embed_tokens and lm_head"),
        (LoraConfig(modules_to_save=("lm_head",), ensure_weight_tying=True), "are not tied"),
    ],
)
def test_attach_refuses_what_the_model_does_not_have_on_every_stage(model_dirs, config, message):
    for stage in build_chain(model_dirs["llama"], 2):
        with pytest.raises(ConfigError, match=message):
            attach_lora(stage, config, seed=0)
