"""What every scheme of the registry does to a weight, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from edge_node.quantize.base import check_packed, packed_bytes, row_tiles
from edge_node.quantize.registry import SCHEMES, scheme_of
from edge_node.quantize.workspace import scratch_elements
from plutino.errors import QuantizationError

every_scheme = pytest.mark.parametrize("name", list(SCHEMES))

MOST_ERROR = {"int8": 0.02, "nf4": 0.10, "int4": 0.12}
"""Relative error of a Gaussian weight: half a step's, by the number of levels and the size of groups."""
MOST_BITS = {"int8": 8.1, "nf4": 4.13, "int4": 4.2}
"""Bits a weight of a 2048 x 2048 matrix, constants counted."""


def gaussian(out_features: int, in_features: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(out_features, in_features, generator=generator) * 0.02).to(dtype)


def unpack(name: str, packed: dict[str, Tensor], shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    return SCHEMES[name].unpack(packed, torch.full(shape, torch.nan, dtype=dtype))


@every_scheme
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip_error_is_that_of_the_schemes_levels(name: str, dtype: torch.dtype) -> None:
    weight = gaussian(64, 1024, dtype=dtype)
    restored = unpack(name, SCHEMES[name].pack(weight), (64, 1024))
    assert (restored - weight.float()).norm() / weight.float().norm() < MOST_ERROR[name]


@every_scheme
def test_packed_tensors_are_those_of_the_layout_and_as_small_as_promised(name: str) -> None:
    scheme = SCHEMES[name]
    packed = scheme.pack(gaussian(96, 256))
    check_packed(scheme, 96, 256, packed)
    assert sum(tensor.nbytes for tensor in packed.values()) == packed_bytes(scheme, 96, 256)
    assert packed_bytes(scheme, 2048, 2048) * 8 / 2048**2 <= MOST_BITS[name]


@every_scheme
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_hold_the_fp32_weight_rounded_once(name: str, dtype: torch.dtype) -> None:
    packed = SCHEMES[name].pack(gaussian(64, 512))
    assert torch.equal(unpack(name, packed, (64, 512), dtype), unpack(name, packed, (64, 512)).to(dtype))


@every_scheme
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_tiles_of_rows_are_parts_of_the_whole(name: str, data: st.DataObject) -> None:
    scheme = SCHEMES[name]
    in_features = data.draw(st.sampled_from([128, 256, 384]) if name == "int4" else st.integers(1, 200))
    multiple = scheme.row_multiple(in_features)
    out_features = data.draw(st.integers(1, 3)) * multiple + data.draw(st.integers(0, 1)) * (in_features % 2 + 1)
    if out_features * in_features % 2:
        out_features += 1
    packed = scheme.pack(gaussian(out_features, in_features, seed=data.draw(st.integers(0, 99))))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    whole = unpack(name, packed, (out_features, in_features), dtype)
    assert not whole.isnan().any()
    most = data.draw(st.integers(1, out_features * in_features))
    for start, end in row_tiles(out_features, in_features, multiple=multiple, max_elements=most):
        if (end - start) * in_features % 2:
            continue
        tile = scheme.unpack(packed, torch.empty(end - start, in_features, dtype=dtype), start_row=start)
        assert torch.equal(tile, whole[start:end])


@every_scheme
@settings(max_examples=8, deadline=None)
@given(scale=st.floats(1e-6, 1e4), rows=st.integers(1, 2), seed=st.integers(0, 999))
def test_packing_what_was_unpacked_changes_little_and_sizes_scale_along(
    name: str, scale: float, rows: int, seed: int
) -> None:
    weight = gaussian(rows * 64, 256, seed=seed) * scale
    once = unpack(name, SCHEMES[name].pack(weight), (rows * 64, 256))
    twice = unpack(name, SCHEMES[name].pack(once), (rows * 64, 256))
    assert (once - weight).norm() < MOST_ERROR[name] * weight.norm()
    assert (twice - once).norm() < 0.2 * (once - weight).norm()


@every_scheme
def test_bf16_weights_pack_like_the_same_values_in_fp32(name: str) -> None:
    weight = gaussian(64, 256, dtype=torch.bfloat16)
    packed, same = SCHEMES[name].pack(weight), SCHEMES[name].pack(weight.float())
    assert all(torch.equal(packed[key], same[key]) for key in same)


@every_scheme
def test_more_weights_than_are_packed_at_once_pack_like_the_parts(name: str) -> None:
    rows, columns = 24, scratch_elements(torch.device("cpu")) // 16
    weight = gaussian(rows, columns)
    whole = unpack(name, SCHEMES[name].pack(weight), (rows, columns))
    part = unpack(name, SCHEMES[name].pack(weight[16:]), (rows - 16, columns))
    # nf4's constants are centred on the matrix's own mean, so that they differ a little.
    assert (whole[16:] - part).norm() < 0.02 * part.norm()


@every_scheme
def test_weights_of_another_layout_pack_alike(name: str) -> None:
    weight = gaussian(256, 128)
    packed, same = SCHEMES[name].pack(weight.t()), SCHEMES[name].pack(weight.t().contiguous())
    assert all(torch.equal(packed[key], same[key]) for key in same)


@every_scheme
@pytest.mark.parametrize("value", [0.0, 1e-40, 3.0, -3.0])
def test_constant_weights_come_back(name: str, value: float) -> None:
    restored = unpack(name, SCHEMES[name].pack(torch.full((64, 128), value)), (64, 128))
    assert torch.allclose(restored, torch.full((64, 128), value), rtol=0.005, atol=1e-38)


@every_scheme
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_weight_that_is_not_finite_is_refused(name: str, bad: float) -> None:
    weight = gaussian(64, 128)
    weight[3, 5] = bad
    with pytest.raises(QuantizationError, match=r"\[64, 128\] weight holds values that are not finite"):
        SCHEMES[name].pack(weight)


@every_scheme
def test_tensor_that_is_no_floating_matrix_is_refused(name: str) -> None:
    for tensor in (torch.zeros(8), torch.zeros(2, 8, 128), torch.zeros(8, 128, dtype=torch.int8)):
        with pytest.raises(QuantizationError, match="packs floating matrices"):
            SCHEMES[name].pack(tensor)


@every_scheme
def test_weight_without_elements_is_refused(name: str) -> None:
    with pytest.raises(QuantizationError, match=r"\[0, 128\]"):
        SCHEMES[name].pack(torch.zeros(0, 128))


@every_scheme
def test_packed_tensors_of_another_weight_are_refused(name: str) -> None:
    scheme = SCHEMES[name]
    packed = scheme.pack(gaussian(64, 128))
    with pytest.raises(QuantizationError, match="quantise the weight again"):
        check_packed(scheme, 64, 256, packed)
    with pytest.raises(QuantizationError, match="consists of"):
        check_packed(scheme, 64, 128, {"codes": packed["codes"]})
    with pytest.raises(QuantizationError, match=r"not torch\.float64"):
        check_packed(scheme, 64, 128, {key: value.double() for key, value in packed.items()})


def test_unknown_scheme_is_refused_with_the_known_ones() -> None:
    with pytest.raises(QuantizationError, match=r"'int3'.*int8, nf4"):
        scheme_of("int3")


def test_int8_codes_and_scales_of_a_known_row() -> None:
    packed = SCHEMES["int8"].pack(torch.tensor([[1.0, -0.5, 0.25, 0.0], [0.0, 0.0, 0.0, 0.0]]))
    # 1 / 127 in bf16.
    assert packed["scales"].tolist() == [0.00787353515625, 0.0]
    assert packed["codes"].tolist() == [[127, -64, 32, 0], [0, 0, 0, 0]]
