"""plutino merge against peft's merge_and_unload: the same bits, written tensor by tensor."""

from __future__ import annotations

import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from coordinator import cli
from coordinator.artifacts import merge as merge_module
from coordinator.artifacts.merge import merge_adapter
from plutino.errors import ConfigError, ExportError
from plutino.manifest import base_model_hash
from plutino.safetensors_index import read_safetensors_headers

pytestmark = [
    # peft's own, of what these tests do on purpose.
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied:UserWarning"),
]

LLAMA_TARGETS = ["q_proj", "down_proj"]
CASES = {
    "lora": ("llama", torch.float32, {}),
    "rslora with patterns": (
        "llama",
        torch.float32,
        {"use_rslora": True, "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 3}},
    ),
    "dora": ("llama", torch.float32, {"use_dora": True}),
    "bf16": ("llama", torch.bfloat16, {}),
    "dora in bf16": ("llama", torch.bfloat16, {"use_dora": True}),
    "trained head": ("llama", torch.float32, {"modules_to_save": ["lm_head"]}),
    "tied, nothing saved": ("tied_llama", torch.float32, {}),
    "tied, trained embedding": ("tied_llama", torch.float32, {"modules_to_save": ["embed_tokens"]}),
    "tied and kept so": ("tied_llama", torch.float32, {"modules_to_save": ["lm_head"], "ensure_weight_tying": True}),
    "conv1d": ("gpt2", torch.float32, {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True}),
    "dora on conv1d": (
        "gpt2",
        torch.float32,
        {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True, "use_dora": True},
    ),
}


def make_adapter(base_dir, folder, **settings):
    """An adapter of stock peft whose every number is random."""
    base = AutoModelForCausalLM.from_pretrained(base_dir, dtype="auto")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=9, **{"target_modules": LLAMA_TARGETS, **settings})
    torch.manual_seed(3)
    model = peft.get_peft_model(base, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bases(model_dirs, tmp_path_factory):
    """The tiny models by name and dtype."""
    folder = tmp_path_factory.mktemp("bf16")
    AutoModelForCausalLM.from_pretrained(model_dirs["llama"], dtype=torch.bfloat16).save_pretrained(folder)
    return {(name, torch.float32): path for name, path in model_dirs.items()} | {("llama", torch.bfloat16): folder}


SLOW = ("dora in bf16", "tied, nothing saved", "dora on conv1d", "dora", "bf16")


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow) if c in SLOW else c for c in CASES])
def test_merged_weights_are_those_of_pefts_merge_to_the_bit_and_load_as_a_plain_model(case, bases, tmp_path):
    name, dtype, settings = CASES[case]
    base_dir = bases[name, dtype]
    adapter_dir = make_adapter(base_dir, tmp_path / "adapter", **settings)

    merged = merge_adapter(adapter_dir, tmp_path / "merged", max_shard_bytes=30_000)

    stock = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base_dir, dtype="auto"), str(adapter_dir)
    ).merge_and_unload()
    ours, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    expected, found = stock.state_dict(), ours.state_dict()
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == dtype
        assert torch.equal(found[key], tensor.to(dtype)), key
    ids = torch.arange(2, 14)[None]
    with torch.inference_mode():
        assert torch.equal(ours(ids).logits, stock(ids).logits)
    assert merged.num_folded == sum(
        key.endswith("lora_A.weight") for key in load_file(adapter_dir / "adapter_model.safetensors")
    )
    assert len(merged.files) > 1


def test_merge_holds_one_tensor_at_a_time_and_copies_the_rest_as_bytes(bases, tmp_path, monkeypatch):
    base_dir = bases["llama", torch.float32]
    adapter_dir = make_adapter(base_dir, tmp_path / "adapter", target_modules=["q_proj"], layers_to_transform=[1])
    folded = []
    fold = merge_module.fold

    def counted(weight, update, config):
        folded.append((update.module, weight.numel()))
        return fold(weight, update, config)

    monkeypatch.setattr(merge_module, "fold", counted)
    arguments = ["merge", str(adapter_dir), "--out", str(tmp_path / "merged"), "--json"]
    told = json.loads(CliRunner().invoke(cli.app, arguments).stdout)
    assert (told["num_folded"], told["num_replaced"], told["is_base_checked"]) == (1, 0, False)
    assert folded == [("model.layers.1.self_attn.q_proj", 32 * 32)]
    base = {name: load_file(base_dir / e.file)[name] for name, e in read_safetensors_headers(base_dir).items()}
    changed = [
        name for name, t in load_file(tmp_path / "merged" / "model.safetensors").items() if not t.equal(base[name])
    ]
    assert changed == ["model.layers.1.self_attn.q_proj.weight"]


def refused(error, adapter_dir, out, **arguments):
    with pytest.raises(error) as caught:
        merge_adapter(adapter_dir, out, **arguments)
    assert not out.exists() and not list(out.parent.glob(".*merging"))
    return str(caught.value)


def test_merge_of_an_adapter_of_another_base_is_refused_by_its_hash(bases, tmp_path):
    adapter_dir = make_adapter(bases["llama", torch.float32], tmp_path / "adapter")
    own_hash = base_model_hash(bases["llama", torch.float32])
    (adapter_dir / "plutino.json").write_text(json.dumps({"base_hash": own_hash}))
    other = bases["tied_llama", torch.float32]
    message = refused(ConfigError, adapter_dir, tmp_path / "merged", base_dir=other)
    assert own_hash[:12] in message and base_model_hash(other)[:12] in message and "--base" in message
    assert merge_adapter(adapter_dir, tmp_path / "merged").is_base_checked


def test_merge_into_a_base_of_other_shapes_is_refused(bases, tmp_path):
    adapter_dir = make_adapter(bases["llama", torch.float32], tmp_path / "adapter")
    tensors = load_file(adapter_dir / "adapter_model.safetensors")
    save_file(
        {k: t[:, :-1].contiguous() if "lora_A" in k else t for k, t in tensors.items()},
        adapter_dir / "adapter_model.safetensors",
    )
    assert "another base model" in refused(ConfigError, adapter_dir, tmp_path / "merged")


def test_merge_of_what_is_no_lora_or_into_a_quantised_base_is_refused_with_the_way_out(bases, tmp_path):
    base_dir = bases["llama", torch.float32]
    adapter_dir = make_adapter(base_dir, tmp_path / "adapter")
    quantised = tmp_path / "quantised"
    shutil.copytree(base_dir, quantised)
    config = json.loads((base_dir / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    assert "unquantised" in refused(ConfigError, adapter_dir, tmp_path / "merged", base_dir=quantised)
    path = adapter_dir / "adapter_config.json"
    values = json.loads(path.read_text())
    for kind in ("PROMPT_TUNING", "PLUTINO_BOTTLENECK"):
        path.write_text(json.dumps({**values, "peft_type": kind}))
        assert "beside the base" in refused(ConfigError, adapter_dir, tmp_path / "merged")
    path.write_text(json.dumps({**values, "lora_bias": True}))
    assert "lora_bias" in refused(ConfigError, adapter_dir, tmp_path / "merged")


def test_merge_of_a_broken_adapter_leaves_nothing(bases, tmp_path):
    adapter_dir = make_adapter(bases["llama", torch.float32], tmp_path / "adapter")
    tensors = load_file(adapter_dir / "adapter_model.safetensors")
    first = next(key for key in tensors if "lora_B" in key)
    save_file(
        tensors | {first: torch.full_like(tensors[first], float("nan"))}, adapter_dir / "adapter_model.safetensors"
    )
    assert "not finite" in refused(ExportError, adapter_dir, tmp_path / "merged")
