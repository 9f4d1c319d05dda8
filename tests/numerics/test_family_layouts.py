"""Checkpoints as hubs hold them, which differ from what transformers saves today; each is made from a tiny model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from edge_node.stage.build import build_stage
from edge_node.stage.weights import LocalSource
from plutino.errors import ModelError
from plutino.families import FAMILIES, family_of
from plutino.safetensors_index import read_safetensors_headers
from tests.numerics.chain import build_chain, make_batch, run_chain
from tests.numerics.tiny_families import describe_folder, make_config, make_model, save_model

Tensors = dict[str, Tensor]

_BASE_PREFIX = {name: family.optional_prefix for name, family in FAMILIES.items()}


def without_prefix(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.removeprefix(prefix): value for name, value in tensors.items()}


def with_head(head: str, embedding: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {head: tensors[embedding].clone()}


def only_head(head: str, embedding: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {head if name == embedding else name: value for name, value in tensors.items()}


def with_buffers(block: str, buffers: dict[str, tuple[int, ...]]) -> Callable[[Tensors], Tensors]:
    """Buffers that old versions of transformers saved with every block."""
    extra = {f"{block}{i}.{name}": torch.ones(shape) for i in range(4) for name, shape in buffers.items()}
    return lambda tensors: tensors | extra


def fused_experts(tensors: Tensors) -> Tensors:
    """Experts as transformers 5 holds them in memory."""
    pattern = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
    single = {match: value for name, value in tensors.items() if (match := pattern.fullmatch(name))}
    rest = {name: value for name, value in tensors.items() if not pattern.fullmatch(name)}
    for block in {match[1] for match in single}:
        stacked = {
            part: torch.stack(
                [v for m, v in sorted(single.items(), key=lambda e: int(e[0][2])) if m[1] == block and m[3] == part]
            )
            for part in ("gate", "up", "down")
        }
        rest[f"{block}.gate_up_proj"] = torch.cat([stacked["gate"], stacked["up"]], dim=1).contiguous()
        rest[f"{block}.down_proj"] = stacked["down"].contiguous()
    return rest


def bf16(tensors: Tensors) -> Tensors:
    return {name: value.bfloat16() for name, value in tensors.items()}


LAYOUTS: dict[str, tuple[str, Callable[[Tensors], Tensors]]] = {
    "qwen2 without prefix": ("qwen2", without_prefix("model.")),
    "gemma2 with a stored head": ("gemma2", with_head("lm_head.weight", "model.embed_tokens.weight")),
    "gemma3_text with only the head": ("gemma3_text", only_head("lm_head.weight", "model.embed_tokens.weight")),
    "llama with rotary buffers": ("llama", with_buffers("model.layers.", {"self_attn.rotary_emb.inv_freq": (4,)})),
    "gpt2 as first published": (
        "gpt2",
        lambda tensors: without_prefix("transformer.")(
            with_buffers("transformer.h.", {"attn.bias": (1, 1, 64, 64), "attn.masked_bias": ()})(tensors)
        ),
    ),
    "gpt_neox with buffers": (
        "gpt_neox",
        with_buffers(
            "gpt_neox.layers.",
            {"attention.bias": (1, 1, 64, 64), "attention.masked_bias": (), "attention.rotary_emb.inv_freq": (1,)},
        ),
    ),
    "gpt_neox under its new head's name": ("gpt_neox", only_head("lm_head.weight", "embed_out.weight")),
    "bloom without prefix": ("bloom", without_prefix("transformer.")),
    "falcon with a stored head": (
        "falcon_multi_query",
        with_head("lm_head.weight", "transformer.word_embeddings.weight"),
    ),
    "opt without prefix": ("opt", without_prefix("model.")),
    "opt with projections and a stored head": (
        "opt_projected",
        with_head("lm_head.weight", "model.decoder.embed_tokens.weight"),
    ),
    "qwen3_moe with single experts": ("qwen3_moe", lambda tensors: tensors),
    "qwen3_moe with fused experts": ("qwen3_moe", fused_experts),
    "phi3 in bf16": ("phi3", bf16),
    "smollm3 with a stored head": ("smollm3", with_head("lm_head.weight", "model.embed_tokens.weight")),
}
OLD_FIELDS = {"bloom": {"hidden_size": "n_embed", "n_head": "num_attention_heads"}}


def write_layout(source: Path, target: Path, change: Callable[[Tensors], Tensors], *, num_shards: int = 1) -> Path:
    """A copy of a single-file model in another layout; with several shards, tensors dealt out in turn."""
    target.mkdir()
    config = json.loads((source / "config.json").read_text())
    for new, old in OLD_FIELDS.get(config["model_type"], {}).items():
        config[old] = config.pop(new)
    (target / "config.json").write_text(json.dumps(config))
    tensors = {name: value.contiguous() for name, value in change(load_file(source / "model.safetensors")).items()}
    if num_shards == 1:
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
        return target
    weight_map = {name: f"model-{i % num_shards}.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        own = {name: value for name, value in tensors.items() if weight_map[name] == file}
        save_file(own, target / file, metadata={"format": "pt"})
    (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return target


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_stages_of_a_published_layout_read_only_their_own_tensors_and_compute_as_transformers_does(tmp_path, layout):
    name, change = LAYOUTS[layout]
    num_shards = 1 + len(layout) % 2
    folder = write_layout(save_model(name, tmp_path / "saved"), tmp_path / "published", change, num_shards=num_shards)
    index = read_safetensors_headers(folder)
    family = family_of(make_config(name).model_type)
    batch = make_batch("right")

    stages = build_chain(folder, 3, attention=None)
    logits, _ = run_chain(stages, batch)

    whole = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=family.attention, dtype=torch.float32)
    assert torch.equal(logits, whole.eval()(**batch.model_inputs).logits)
    bare_prefix = family.block_prefix.removeprefix(family.optional_prefix)
    for stage in stages:
        blocks = [re.search(rf"(?:^|\.){re.escape(bare_prefix)}(\d+)\.", read) for read in stage.tensor_names_read]
        own = range(stage.start_block, stage.end_block)
        assert {int(match[1]) for match in blocks if match} == set(own)
        ends = [read for read, match in zip(stage.tensor_names_read, blocks, strict=True) if not match]
        assert bool(ends) == (stage.is_first or stage.is_last)
        assert len(stage.tensor_names_read) == len(set(stage.tensor_names_read)) == stage.tensors_read
        assert stage.bytes_read == sum(index[read].end - index[read].start for read in stage.tensor_names_read)
        assert not any(parameter.is_meta for parameter in stage.model.parameters())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_planner_counts_a_published_layouts_parameters_as_they_are_held(tmp_path, layout):
    name, change = LAYOUTS[layout]
    folder = write_layout(save_model(name, tmp_path / "saved"), tmp_path / "published", change)

    table = describe_folder(folder)

    model = make_model(name)
    predicted = sum(table.block_params) + table.embedding_params + table.final_params
    assert predicted + (0 if table.is_tied else table.head_params) == sum(p.numel() for p in model.parameters())
    assert table.largest_tensor_params == max(p.numel() for p in model.parameters())


@torch.no_grad()
def test_stored_head_that_differs_from_a_tied_embedding_is_a_head_of_its_own_as_in_transformers(tmp_path):
    def with_another_head(tensors: Tensors) -> Tensors:
        return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].flip(0).clone()}

    folder = write_layout(save_model("smollm3", tmp_path / "saved"), tmp_path / "published", with_another_head)
    batch = make_batch("full")

    logits, _ = run_chain(build_chain(folder, 2, attention=None), batch)

    assert torch.equal(logits, AutoModelForCausalLM.from_pretrained(folder).eval()(**batch.model_inputs).logits)


def test_stored_head_equal_to_a_tied_embedding_is_held_once(tmp_path):
    change = with_head("lm_head.weight", "model.embed_tokens.weight")
    folder = write_layout(save_model("smollm3", tmp_path / "saved"), tmp_path / "published", change)

    (stage,) = build_chain(folder, 1, attention=None)

    embedding, head = stage.model.get_input_embeddings().weight, stage.model.get_output_embeddings().weight
    assert head.data_ptr() == embedding.data_ptr()


@pytest.mark.parametrize(
    ("lost", "stored"),
    [
        (
            "model.layers.1.mlp.experts.3.up_proj.weight",
            "cannot be merged into model.layers.1.mlp.experts.gate_up_proj",
        ),
        ("model.layers.1.mlp.gate.weight", r"lacks 1 of the stage's .*mlp\.gate\.weight"),
    ],
)
def test_missing_part_of_a_mixture_of_experts_is_named(tmp_path, lost, stored):
    def without(tensors: Tensors) -> Tensors:
        return {name: value for name, value in tensors.items() if name != lost}

    folder = write_layout(save_model("qwen3_moe", tmp_path / "saved"), tmp_path / "published", without)

    with pytest.raises(ModelError, match=stored):
        build_stage(LocalSource(folder), 1, 2, dtype=torch.float32)


def test_folder_with_only_pickled_weights_is_refused_with_the_way_to_convert_it(tmp_path):
    save_model("opt", tmp_path / "saved")
    (tmp_path / "saved" / "model.safetensors").unlink()
    (tmp_path / "saved" / "pytorch_model.bin").write_bytes(b"pickle")

    with pytest.raises(ModelError, match=r"pickled weights \(pytorch_model.bin\).*save_pretrained"):
        LocalSource(tmp_path / "saved")
