from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from edge_node.stage.architecture import make_position_ids
from edge_node.stage.build import build_stage
from edge_node.stage.weights import RANGE_BYTES, LocalSource, RangeSource
from plutino.errors import ModelError
from plutino.families import family_of
from plutino.safetensors_index import read_safetensors_headers
from plutino.stand_ins import AddsNothing
from tests.numerics.chain import Batch, frozen_chain, make_batch, run_chain

MODELS = ("llama", "tied_llama", "gpt2")


@cache
def load_whole(model_dir: Path, **options):
    return AutoModelForCausalLM.from_pretrained(model_dir, **({"dtype": torch.float32} | options)).eval()


def copy_model(source: Path, target: Path, rename) -> None:
    """A copy of a single-file model whose tensors are renamed; a name of None leaves the tensor out."""
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = load_file(source / "model.safetensors")
    save_file({rename(name): value for name, value in tensors.items() if rename(name)}, target / "model.safetensors")


@pytest.mark.parametrize("kind", ["full", "right", "left", "packed"])
@pytest.mark.parametrize("num_stages", [2, 3])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_chain_of_stages_gives_the_whole_models_logits_bit_for_bit(model_dirs, name, num_stages, kind):
    batch = make_batch(kind)

    logits, _ = run_chain(frozen_chain(model_dirs[name], num_stages), batch)

    assert torch.equal(logits, load_whole(model_dirs[name])(**batch.model_inputs).logits)


@pytest.mark.parametrize("kind", ["left", "packed"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_chain_with_eager_attention_gives_the_whole_models_logits_bit_for_bit(model_dirs, name, kind):
    batch = make_batch(kind)

    logits, _ = run_chain(frozen_chain(model_dirs[name], 2, attention="eager"), batch)

    whole = load_whole(model_dirs[name], attn_implementation="eager")
    assert torch.equal(logits, whole(**batch.model_inputs).logits)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_chain_in_bf16_gives_the_whole_models_logits_bit_for_bit(model_dirs, name):
    batch = make_batch("right")

    logits, _ = run_chain(frozen_chain(model_dirs[name], 3, dtype=torch.bfloat16), batch)

    assert logits.dtype == torch.bfloat16
    assert torch.equal(logits, load_whole(model_dirs[name], dtype=torch.bfloat16)(**batch.model_inputs).logits)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_packed_row_with_padding_gives_each_segment_its_own_logits(model_dirs, attention):
    stages = frozen_chain(model_dirs["llama"], 2, attention=attention)
    ids = torch.tensor([[7, 8, 9, 11, 12, 0, 0]])
    segments, mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1]]), torch.tensor([[1, 1, 1, 1, 1, 0, 0]])
    family = family_of("llama")

    packed, _ = run_chain(stages, Batch(ids, mask, segments, make_position_ids(family, mask, segments, (1, 7))))
    alone, _ = run_chain(stages, Batch(ids[:, 3:5], None, None, torch.arange(2)[None]))

    # Another length means another order of summation in attention.
    torch.testing.assert_close(packed[:, 3:5], alone, rtol=0, atol=1e-5)
    assert packed.isfinite().all()


@pytest.mark.parametrize("num_stages", [1, 3])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_decoding_with_caches_gives_the_tokens_and_logits_of_generate(model_dirs, name, num_stages):
    prompt, new_tokens = make_batch("left"), 6
    whole = load_whole(model_dirs[name])
    expected = whole.generate(
        prompt.input_ids,
        attention_mask=prompt.attention_mask,
        max_new_tokens=new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    stages = frozen_chain(model_dirs[name], num_stages)
    caches = [stage.new_cache() for stage in stages]

    batch, tokens = prompt, prompt.input_ids
    for step in range(new_tokens):
        logits, _ = run_chain(stages, batch, caches)
        torch.testing.assert_close(logits[:, -1], expected.logits[step], rtol=0, atol=1e-5)
        new = logits[:, -1:].argmax(-1)
        tokens = torch.cat([tokens, new], dim=1)
        mask = torch.cat([batch.attention_mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
        past = mask.shape[1] - 1
        batch = Batch(new, mask, None, make_position_ids(stages[0].family, mask, None, (2, 1), past))

    assert torch.equal(tokens, expected.sequences)


@pytest.mark.parametrize("name", MODELS)
def test_stages_read_exactly_their_own_tensors(model_dirs, name):
    index = read_safetensors_headers(model_dirs[name])

    stages = frozen_chain(model_dirs[name], 3)

    tied = {stages[0].family.embedding[0]} if stages[0].is_tied else set()
    for stage in stages:
        prefix = stage.family.block_prefix
        own_blocks = tuple(f"{prefix}{block}." for block in range(stage.start_block, stage.end_block))
        in_blocks = [tensor for tensor in stage.tensor_names_read if tensor.startswith(prefix)]
        assert in_blocks and all(tensor.startswith(own_blocks) for tensor in in_blocks)
        assert stage.bytes_read == sum(index[t].end - index[t].start for t in stage.tensor_names_read)
    assert set().union(*(stage.tensor_names_read for stage in stages)) == index.keys()
    assert sum(stage.tensors_read for stage in stages) == len(index) + len(tied)
    assert not any(parameter.is_meta for stage in stages for parameter in stage.model.parameters())


def test_middle_stage_holds_nothing_but_its_blocks(model_dirs):
    stage = frozen_chain(model_dirs["gpt2"], 3)[1]

    names = dict(stage.model.named_parameters())

    assert names and all(name.startswith(("transformer.h.1.", "transformer.h.2.")) for name in names)
    assert not any(parameter.requires_grad for parameter in names.values())


@pytest.mark.parametrize("name", ["tied_llama", "gpt2"])
def test_single_stage_of_a_tied_model_has_one_storage_for_embedding_and_head(model_dirs, name):
    (stage,) = frozen_chain(model_dirs[name], 1)

    embedding = stage.model.get_submodule(stage.embedding_name).weight

    assert stage.model.get_submodule(stage.head_name).weight.data_ptr() == embedding.data_ptr()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_published_layout_without_prefix_gives_the_same_logits(model_dirs, tmp_path, name):
    """Base checkpoints as published lack the head's class prefix and carry buffers that are recomputed."""
    source = model_dirs["tied_llama" if name == "llama" else name]
    copy_model(source, tmp_path, lambda tensor: tensor.removeprefix(family_of(name).optional_prefix))
    batch = make_batch("right")

    logits, _ = run_chain(frozen_chain(tmp_path, 2), batch)

    assert torch.equal(logits, run_chain(frozen_chain(source, 2), batch)[0])


@torch.no_grad()
def test_tied_checkpoint_that_kept_only_the_head_gives_the_same_logits(model_dirs, tmp_path):
    renames = {"model.embed_tokens.weight": "lm_head.weight"}
    copy_model(model_dirs["tied_llama"], tmp_path, lambda tensor: renames.get(tensor, tensor))
    batch = make_batch("full")

    logits, _ = run_chain(frozen_chain(tmp_path, 2), batch)

    assert torch.equal(logits, run_chain(frozen_chain(model_dirs["tied_llama"], 2), batch)[0])


def test_build_stage_names_a_missing_tensor(model_dirs, tmp_path):
    copy_model(model_dirs["gpt2"], tmp_path, lambda tensor: None if "h.2.mlp.c_fc.weight" in tensor else tensor)

    with pytest.raises(ModelError, match=r"lacks 1 of the stage's .*transformer\.h\.2\.mlp\.c_fc\.weight"):
        build_stage(LocalSource(tmp_path), 2, 3, dtype=torch.float32)


def test_build_stage_refuses_a_tensor_of_another_shape(model_dirs, tmp_path):
    copy_model(model_dirs["gpt2"], tmp_path, lambda tensor: tensor)
    config = (tmp_path / "config.json").read_text().replace('"vocab_size": 61', '"vocab_size": 62')
    (tmp_path / "config.json").write_text(config)

    with pytest.raises(ModelError, match=r"has shape \[61, 32\] but config.json asks for \[62, 32\]"):
        build_stage(LocalSource(tmp_path), 0, 1, dtype=torch.float32)


@pytest.mark.parametrize(("start", "end"), [(0, 5), (-1, 2), (2, 2), (3, 1)])
def test_build_stage_refuses_blocks_that_the_model_lacks(model_dirs, start, end):
    with pytest.raises(ModelError, match=r"model with blocks \[0, 4\)"):
        build_stage(LocalSource(model_dirs["llama"]), start, end, dtype=torch.float32)


def test_rotary_frequencies_are_the_whole_models(model_dirs):
    stage = frozen_chain(model_dirs["llama"], 2, dtype=torch.bfloat16)[1]

    whole = load_whole(model_dirs["llama"], dtype=torch.bfloat16)

    assert torch.equal(stage.model.model.rotary_emb.inv_freq, whole.model.rotary_emb.inv_freq)


def test_adding_nothing_keeps_every_bit():
    x = torch.tensor([0.0, -0.0, 1e-45, -3.5, float("inf")], dtype=torch.bfloat16)

    total = x + AddsNothing()()

    assert total.dtype == x.dtype
    assert torch.equal(total.view(torch.int16), x.view(torch.int16))


@pytest.mark.parametrize(
    ("mask", "segments", "shape", "past", "expected"),
    [
        (None, None, (1, 3), 0, [[0, 1, 2]]),
        (None, None, (1, 1), 5, [[5]]),
        ([[1, 1, 1, 0, 0]], None, (1, 5), 0, [[0, 1, 2, 0, 0]]),
        ([[0, 0, 1, 1, 1]], None, (1, 5), 0, [[0, 0, 0, 1, 2]]),
        ([[0, 0, 1, 1, 1]], None, (1, 2), 3, [[1, 2]]),
        (None, [[0, 0, 1, 2, 2]], (1, 5), 0, [[0, 1, 0, 0, 1]]),
    ],
    ids=["full", "past", "right", "left", "left-past", "packed"],
)
def test_make_position_ids_counts_tokens_from_zero(mask, segments, shape, past, expected):
    as_tensor = [None if values is None else torch.tensor(values) for values in (mask, segments)]

    positions = make_position_ids(family_of("llama"), *as_tensor, shape, past)

    assert positions.tolist() == expected


def test_range_source_gives_the_tensors_of_a_local_source(model_dirs):
    local = LocalSource(model_dirs["llama"])
    asked: list[int] = []

    def read_range(file: str, start: int, end: int) -> bytes:
        asked.append(end - start)
        return (model_dirs["llama"] / file).read_bytes()[start:end]

    remote = RangeSource(local.config(), read_safetensors_headers(model_dirs["llama"]), read_range)

    assert all(torch.equal(remote.read(n, torch.bfloat16), local.read(n, torch.bfloat16)) for n in local.names())
    assert remote.bytes_read == local.bytes_read == sum(asked)
    assert max(asked) <= RANGE_BYTES


def test_range_source_refuses_a_short_answer(model_dirs):
    index = read_safetensors_headers(model_dirs["llama"])
    source = RangeSource({}, index, lambda file, start, end: b"\0" * (end - start - 1))

    with pytest.raises(ModelError, match="but got"):
        source.read("model.norm.weight", torch.float32)


def test_local_source_refuses_integer_weights(tmp_path):
    save_file({"w": torch.zeros(2, dtype=torch.int8)}, tmp_path / "model.safetensors")

    with pytest.raises(ModelError, match="stored as I8"):
        LocalSource(tmp_path).read("w", torch.float32)


def test_local_source_names_a_file_that_shrank_after_its_header_was_read(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.zeros(100)}, path)
    source = LocalSource(tmp_path)
    path.write_bytes(path.read_bytes()[:-4])

    with pytest.raises(ModelError, match="inside a tensor; download it again"):
        source.read("w", torch.float32)


def test_local_source_reads_scalars_and_empty_tensors(tmp_path):
    save_file({"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 3)}, tmp_path / "model.safetensors")

    source = LocalSource(tmp_path)

    assert source.read("scalar", torch.float32).item() == 1.5
    assert source.read("empty", torch.float32).shape == (0, 3)
