"""GPTQ checkpoints: those that a public library made, and hand-packed ones for what it cannot make (desc_act, v2)."""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from edge_node.quantize.gptq import Gptq
from edge_node.quantize.linear import QuantLinear
from edge_node.quantize.workspace import held_workspace_bytes, release_workspace
from edge_node.stage.build import build_stage
from edge_node.stage.weights import LocalSource
from partitioner.packed import matrix_bytes
from plutino.errors import ModelError, QuantizationError
from plutino.gptq_index import GptqFormat
from plutino.job.assignment import StageShape
from plutino.job.model import Packing
from tests.numerics.pipelines import make_batches, make_spec, pipeline_of, train
from tests.numerics.test_quant_linear import tensors_alive

DATA = Path(__file__).resolve().parents[1] / "data" / "gptq"
MADE = json.loads((DATA / "expected.json").read_text())
GPTQ = Packing(scheme="gptq")


def build(folder, dtype=torch.float32):
    return build_stage(LocalSource(folder), 0, 1, dtype=dtype, packing=GPTQ)


@pytest.mark.parametrize("name", MADE)
def test_made_checkpoint_dequantises_to_the_librarys_own_weights_to_the_bit(name):
    stage = build(DATA / name)

    found = {}
    for layer in stage.block_linears:
        # The library's product with the identity turns -0.0, which negative scales give, into 0.0.
        weight = stage.model.get_submodule(layer).dequantize(torch.float16) + 0.0
        found[layer] = hashlib.sha256(weight.numpy().tobytes()).hexdigest()
    assert found == MADE[name]


@pytest.mark.parametrize("name", MADE)
def test_made_checkpoint_trains_every_lora_matrix(name):
    spec = make_spec(DATA / name, target_modules="all-linear")
    batch = make_batches(1)[0]
    with pipeline_of(spec, [StageShape(start_block=0, end_block=1)], packing=GPTQ) as pipeline:
        losses = [decision.loss for decision in train(pipeline, [batch] * 4)]
        (outcome,) = pipeline.train_step(4, batch.rows, batch.loss_weight).values()

    assert losses[-1] < 0.97 * losses[0]
    assert all(norm > 0 for norm in outcome.squared_norms)


def pack_words(values, bits, dim):
    """int32 words along a dimension, lowest bits first: the packer of the published format."""
    per_word = 32 // bits
    grouped = values.long().unflatten(dim, (-1, per_word))
    shifts = (torch.arange(per_word) * bits).reshape([per_word if d == dim + 1 else 1 for d in range(grouped.dim())])
    words = (grouped << shifts).sum(dim=dim + 1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def hand_packed(packing, out_features, in_features, seed=0):
    """A checkpoint's tensors of one layer and the weight they stand for."""
    generator = torch.Generator().manual_seed(seed)
    num_groups, most = packing.num_groups(in_features), 1 << packing.bits
    size = in_features if packing.group_size == -1 else packing.group_size
    codes_IO = torch.randint(0, most, (in_features, out_features), generator=generator)
    zeros_GO = torch.randint(0, most, (num_groups, out_features), generator=generator)
    scales_GO = (torch.rand(num_groups, out_features, generator=generator) * 0.1).half()
    groups_I = torch.arange(in_features) // size
    if packing.desc_act:
        groups_I = groups_I[torch.randperm(in_features, generator=generator)]
    stored = {
        "qweight": pack_words(codes_IO, packing.bits, 0),
        "qzeros": pack_words((zeros_GO - packing.zero_offset) % most, packing.bits, 1),
        "scales": scales_GO,
        "g_idx": groups_I.int(),
    }
    weight_IO = scales_GO[groups_I].double() * (codes_IO - zeros_GO[groups_I])
    return stored, weight_IO.t()


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from([4, 8]),
    group_size=st.sampled_from([-1, 8, 16, 32]),
    desc_act=st.booleans(),
    zero_offset=st.sampled_from([0, 1]),
    out_words=st.integers(1, 6),
    in_groups=st.integers(1, 3),
)
def test_repacked_layer_is_exact_in_every_published_variant(
    bits, group_size, desc_act, zero_offset, out_words, in_groups
):
    packing = GptqFormat(bits=bits, group_size=group_size, desc_act=desc_act, zero_offset=zero_offset)
    out_features, in_features = out_words * 32 // bits, in_groups * 32
    stored, weight = hand_packed(packing, out_features, in_features)
    scheme = Gptq(packing)

    packed = scheme.repack("q", stored)
    linear = QuantLinear(scheme, out_features, in_features, packed)

    assert torch.equal(linear.dequantize().double(), weight)
    assert torch.equal(linear.dequantize(torch.bfloat16), weight.float().bfloat16())
    rows = torch.empty(out_features // 2, in_features)
    assert torch.equal(
        scheme.unpack(packed, rows, start_row=out_features // 4).double(), weight[out_features // 4 :][: len(rows)]
    )
    assert linear.packed_bytes == matrix_bytes("gptq", out_features, in_features, gptq=packing)


every_gptq = pytest.mark.parametrize(("bits", "desc_act"), [(4, False), (4, True), (8, False), (8, True)])


def gptq_layer(bits, desc_act, out_features=48, in_features=32):
    packing = GptqFormat(bits=bits, group_size=16, desc_act=desc_act, zero_offset=1)
    stored, weight = hand_packed(packing, out_features, in_features)
    return QuantLinear(Gptq(packing), out_features, in_features, Gptq(packing).repack("q", stored)), weight.float()


@every_gptq
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradient_after_an_evaluation_pass_is_that_of_the_dequantised_layer(bits, desc_act, mode):
    linear, weight = gptq_layer(bits, desc_act)
    release_workspace()  # so that the evaluation pass is the one that makes it
    linear.eval()
    with mode():
        linear(torch.randn(3, 32))
    linear.train()
    x = torch.randn(5, 32, requires_grad=True)
    upstream = torch.randn(5, 48)

    linear(x).backward(upstream)

    torch.testing.assert_close(x.grad, upstream @ weight, rtol=1e-6, atol=1e-5)


@every_gptq
def test_nothing_of_the_weights_size_lives_between_forward_and_backward(bits, desc_act):
    linear, _ = gptq_layer(bits, desc_act, 256, 128)
    x = torch.randn(2, 128, requires_grad=True)
    linear(x).sum().backward()  # the workspace exists from here on
    known, held_bytes = {id(tensor) for tensor in tensors_alive()}, held_workspace_bytes()
    saved = []

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        y = linear(x)

    gc.collect()
    new = [tensor for tensor in tensors_alive() if id(tensor) not in known]
    assert saved == []
    assert {tensor.untyped_storage().data_ptr() for tensor in new} == {y.untyped_storage().data_ptr()}
    assert held_workspace_bytes() == held_bytes


def changed(folder, tmp_path, change, config_change=None):
    target = shutil.copytree(folder, tmp_path / "model")
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors")
    if config_change:
        config = json.loads((target / "config.json").read_text())
        config["quantization_config"] |= config_change
        (target / "config.json").write_text(json.dumps(config))
    return target


DOWN = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(
    ("change", "config_change", "message"),
    [
        (lambda t: t.pop(f"{DOWN}.scales"), {}, r"lacks 1 of .*down_proj\.scales"),
        (lambda t: t.update({f"{DOWN}.scales": t[f"{DOWN}.scales"][:2].clone()}), {}, r"scales has shape \[2, 64\]"),
        (lambda t: None, {"group_size": 16}, r"qzeros has shape \[2, 8\]"),
        (lambda t: None, {"bits": 8, "group_size": -1}, "config.json"),
    ],
    ids=["missing", "shape", "group size", "bits"],
)
def test_broken_checkpoint_is_refused_before_anything_is_read(tmp_path, change, config_change, message):
    source = LocalSource(changed(DATA / "w4g32-asym", tmp_path, change, config_change))

    with pytest.raises(ModelError, match=message):
        build_stage(source, 0, 1, dtype=torch.float32, packing=GPTQ)

    assert source.bytes_read == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[f"{DOWN}.g_idx"].fill_(7), "names groups 7 to 7, the layer has 3"),
        (lambda t: t[f"{DOWN}.g_idx"].copy_(t[f"{DOWN}.g_idx"].flip(0)), "says desc_act: false"),
        (lambda t: t.update({f"{DOWN}.scales": t[f"{DOWN}.scales"].float() + 1e-6}), "fp16 does not hold exactly"),
    ],
    ids=["groups", "order", "scales"],
)
def test_broken_values_are_refused_with_the_layers_name(tmp_path, change, message):
    folder = changed(DATA / "w4g32-asym", tmp_path, change)

    with pytest.raises(QuantizationError, match=rf"model\.layers\.0\.mlp\.down_proj.*{message}"):
        build(folder)


def test_gptq_checkpoint_without_the_setting_is_refused_with_the_way_out():
    with pytest.raises(ModelError, match=r"set model\.quantization: gptq"):
        build_stage(LocalSource(DATA / "w4g32-asym"), 0, 1, dtype=torch.float32)


def test_gptq_never_quantises_by_itself():
    with pytest.raises(QuantizationError, match="takes calibration data"):
        Gptq(GptqFormat(bits=4, group_size=32, desc_act=False, zero_offset=1)).pack(torch.zeros(32, 32))
