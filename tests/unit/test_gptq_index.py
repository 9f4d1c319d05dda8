from __future__ import annotations

import pytest

from plutino.errors import ModelError
from plutino.gptq_index import GptqFormat, gptq_format, layer_shape, unpacked_shapes

PACKING = GptqFormat(bits=4, group_size=32, desc_act=False, zero_offset=1)
LAYER = {
    "q.qweight": (8, 64),
    "q.qzeros": (2, 8),
    "q.scales": (2, 64),
    "q.g_idx": (64,),
}


def config(**changes):
    return {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False} | changes}


def test_gptq_format_of_an_unquantised_model_is_none():
    assert gptq_format({"model_type": "llama"}) is None


@pytest.mark.parametrize(("checkpoint_format", "offset"), [("gptq", 1), ("gptq_v2", 0), (None, 1)])
def test_gptq_format_v1_stores_zero_points_minus_one(checkpoint_format, offset):
    changes = {} if checkpoint_format is None else {"checkpoint_format": checkpoint_format}

    assert gptq_format(config(**changes)) == PACKING.model_copy(update={"zero_offset": offset})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_method": "awq"}, "quantised by 'awq'; plutino reads gptq"),
        ({"bits": 3}, "3 bits a weight; plutino reads 4 and 8"),
        ({"group_size": 0}, "group_size 0; a whole number from 1, or -1"),
        ({"dynamic": {"-:.*": {}}}, "other bits or groups for some layers"),
        ({"checkpoint_format": "marlin"}, "in the format 'marlin'"),
    ],
)
def test_gptq_format_that_is_not_read_is_refused_with_the_way_out(changes, message):
    with pytest.raises(ModelError, match=message):
        gptq_format(config(**changes))


def test_layer_shape_is_that_of_the_weight():
    assert layer_shape("q", LAYER, PACKING) == (64, 64)


@pytest.mark.parametrize(
    ("part", "shape", "message"),
    [
        ("q.qzeros", None, "lacks qzeros"),
        ("q.scales", (3, 64), r"q\.scales has shape \[3, 64\].* ask for \[2, 64\]"),
        ("q.g_idx", (32,), r"q\.g_idx has shape \[32\]"),
        ("q.qweight", (9, 64), "group_size 32 .* does not divide the 72 inputs"),
        ("q.qweight", (8, 63), "63 outputs, which 4-bit zero points in words of 8 cannot hold"),
        ("q.qweight", (512,), "a matrix is needed"),
    ],
)
def test_layer_shape_of_a_broken_layer_is_refused(part, shape, message):
    broken = {name: found for name, found in (LAYER | {part: shape}).items() if found is not None}

    with pytest.raises(ModelError, match=message):
        layer_shape("q", broken, PACKING)


def test_layer_shape_with_desc_act_needs_the_groups():
    without = {name: shape for name, shape in LAYER.items() if name != "q.g_idx"}

    assert layer_shape("q", without, PACKING) == (64, 64)
    with pytest.raises(ModelError, match="lacks g_idx"):
        layer_shape("q", without, PACKING.model_copy(update={"desc_act": True}))


def test_unpacked_shapes_are_those_of_the_unquantised_checkpoint():
    found = unpacked_shapes(LAYER | {"norm.weight": (64,), "q.bias": (64,), "k.weight": (4, 4)}, PACKING)

    assert found == {"norm.weight": (64,), "q.bias": (64,), "k.weight": (4, 4), "q.weight": (64, 64)}


def test_unpacked_shapes_of_a_checkpoint_without_packed_layers_is_refused():
    with pytest.raises(ModelError, match="no tensor is a qweight"):
        unpacked_shapes({"norm.weight": (64,)}, PACKING)
    with pytest.raises(ModelError, match="layer k lacks its qweight"):
        unpacked_shapes(LAYER | {"k.qzeros": (1, 1)}, PACKING)
