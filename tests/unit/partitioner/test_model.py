from __future__ import annotations

import json
from pathlib import Path

import pytest

from partitioner.adapter import adapter_params_of
from partitioner.model import describe_model
from plutino import families
from plutino.errors import ConfigError, ModelError
from plutino.families import family_of
from plutino.job.method import AdaptersConfig, LoraConfig
from plutino.safetensors_index import read_safetensors_headers
from tests.unit.partitioner.fleet import gpt2, gpt2_config, gpt2_tensors, llama, llama_config, llama_tensors


def test_describe_model_bundled_model_counts_every_parameter_once():
    folder = Path(families.__file__).parent / "assets/models/tiny-llama-7m"
    shapes = {name: entry.shape for name, entry in read_safetensors_headers(folder).items()}

    table = describe_model(json.loads((folder / "config.json").read_text()), shapes, family_of("llama"))

    num_params = sum(table.block_params) + table.embedding_params + table.final_params
    assert num_params == 6_951_168
    assert (table.num_blocks, table.is_tied, table.head_params) == (8, True, 4096 * 256)


def test_describe_model_conv1d_gives_linears_in_to_out():
    (linears, *_) = gpt2().block_linears

    assert {linear.name: (linear.in_features, linear.out_features) for linear in linears} == {
        "attn.c_attn": (48, 144),
        "attn.c_proj": (48, 48),
        "mlp.c_fc": (48, 192),
        "mlp.c_proj": (192, 48),
    }


@pytest.mark.parametrize(
    ("config", "tensors", "family", "prefix"),
    [
        (llama_config(), llama_tensors(llama_config()), "llama", "model."),
        (gpt2_config(), gpt2_tensors(gpt2_config()), "gpt2", "transformer."),
    ],
)
def test_describe_model_published_without_prefix_equals_with_prefix(config, tensors, family, prefix):
    bare = {name.removeprefix(prefix): shape for name, shape in tensors.items()}

    assert describe_model(config, bare, family_of(family)) == describe_model(config, tensors, family_of(family))


def test_describe_model_ignores_recomputed_buffers():
    config, tensors = gpt2_config(), gpt2_tensors(gpt2_config())
    clean = {name: shape for name, shape in tensors.items() if not name.endswith(".attn.bias")}

    assert describe_model(config, tensors, family_of("gpt2")) == describe_model(config, clean, family_of("gpt2"))


def test_describe_model_missing_block_names_it():
    config = llama_config(4)
    tensors = {name: shape for name, shape in llama_tensors(config).items() if ".layers.2." not in name}

    with pytest.raises(ModelError, match=r"says 4 blocks, the checkpoint holds 3; block 2 is missing"):
        describe_model(config, tensors, family_of("llama"))


def test_describe_model_more_blocks_than_configured_is_refused():
    with pytest.raises(ModelError, match="says 3 blocks, the checkpoint holds 4"):
        describe_model(llama_config(3), llama_tensors(llama_config(4)), family_of("llama"))


def test_describe_model_config_of_another_width_names_the_tensor():
    config = llama_config(2)

    with pytest.raises(ModelError, match=r"gate_proj.weight has shape \[176, 64\], the config implies \[128, 64\]"):
        describe_model(config | {"intermediate_size": 128}, llama_tensors(config), family_of("llama"))


@pytest.mark.parametrize("missing", ["lm_head.weight", "model.norm.weight", "model.embed_tokens.weight"])
def test_describe_model_missing_outer_tensor_is_refused(missing):
    config = llama_config(2, tie_word_embeddings=False)
    tensors = {name: shape for name, shape in llama_tensors(config).items() if name != missing}

    with pytest.raises(ModelError, match="lacks"):
        describe_model(config, tensors, family_of("llama"))


@pytest.mark.parametrize("value", [None, 0, "64", True])
def test_describe_model_unusable_size_names_the_key(value):
    with pytest.raises(ModelError, match="hidden_size = "):
        describe_model(llama_config(hidden_size=value), llama_tensors(llama_config()), family_of("llama"))


def test_adapter_all_linear_has_rank_times_in_and_out():
    adapter = adapter_params_of(llama(2), LoraConfig(rank=4))

    sizes = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 176), (64, 176), (176, 64)]
    assert [block.params for block in adapter.blocks] == [4 * sum(i + o for i, o in sizes)] * 2
    assert [block.rank_sum for block in adapter.blocks] == [28, 28]


def test_adapter_rank_pattern_first_match_wins_and_is_anchored_at_the_end():
    method = LoraConfig(rank=4, target_modules=("q_proj", "v_proj"), rank_pattern={r"1\.self_attn\.q_proj": 2, "q": 99})

    adapter = adapter_params_of(llama(2), method)

    assert [block.rank_sum for block in adapter.blocks] == [8, 6]


def test_adapter_in_chosen_blocks_leaves_the_others_empty():
    adapter = adapter_params_of(llama(4), LoraConfig(blocks=(1, 3)))

    assert [bool(block.params) for block in adapter.blocks] == [False, True, False, True]


def test_adapter_dora_adds_one_magnitude_for_each_output():
    plain = adapter_params_of(llama(1), LoraConfig(target_modules=("down_proj",)))
    dora = adapter_params_of(llama(1), LoraConfig(target_modules=("down_proj",), use_dora=True))

    assert dora.num_params - plain.num_params == 64


@pytest.mark.parametrize(
    ("modules", "tie", "expected"),
    [
        (("lm_head",), False, (0, 64000)),
        (("embed_tokens",), False, (64000, 0)),
        (("lm_head", "embed_tokens"), False, (64000, 64000)),
        (("embed_tokens",), True, (64000, 64000)),
    ],
)
def test_adapter_modules_to_save_trains_embedding_and_head_in_full(modules, tie, expected):
    adapter = adapter_params_of(llama(1), LoraConfig(modules_to_save=modules, ensure_weight_tying=tie))

    assert (adapter.first_params, adapter.last_params) == expected


@pytest.mark.parametrize(
    ("method", "names"),
    [
        (LoraConfig(target_modules=("c_attn",)), r"'c_attn'.*q_proj"),
        (LoraConfig(blocks=(7,)), r"blocks is \[7\].*0 to 3"),
        (LoraConfig(modules_to_save=("norm",)), r"'norm'.*embed_tokens and lm_head"),
        (LoraConfig(blocks=()), r"blocks is \[\]"),
        (AdaptersConfig(blocks="last 5"), "last 5 but the model has 4"),
    ],
)
def test_adapter_name_that_matches_nothing_says_what_there_is(method, names):
    with pytest.raises(ConfigError, match=names):
        adapter_params_of(llama(4), method)
