"""nf4 against the paper's levels and against bitsandbytes, where that is installed."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from edge_node.quantize import native, nf4_levels
from edge_node.quantize.nf4 import Nf4, unpack_in_torch
from edge_node.quantize.nf4_levels import LEVELS, constant_levels
from edge_node.quantize.workspace import release_workspace
from plutino.errors import QuantizationError


def weight_of(out_features: int, in_features: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


def test_levels_times_a_power_of_two_come_back_exactly() -> None:
    # One block holding every level, and equal constants, so that their mean is exact and the rest 0.
    weight = torch.tensor(LEVELS).repeat(8, 4) * 0.5
    packed = Nf4().pack(weight)
    assert packed["codes"][:8].tolist() == [0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF]
    assert packed["nested_offset"].item() == 0.5
    assert torch.equal(Nf4().unpack(packed, torch.empty_like(weight)), weight)


def test_levels_are_the_quantiles_of_the_paper() -> None:
    # Appendix E: quantiles of 8 parts below 0 and 9 above, divided by the largest; the offset is the authors' code's.
    normal = torch.distributions.Normal(0.0, 1.0)
    above = normal.icdf(torch.linspace(0.9677083, 0.5, 9, dtype=torch.float64))[:-1]
    below = -normal.icdf(torch.linspace(0.9677083, 0.5, 8, dtype=torch.float64))[:-1]
    levels = torch.cat([below, torch.zeros(1, dtype=torch.float64), above]).sort().values
    assert torch.allclose(levels / levels.max(), torch.tensor(LEVELS, dtype=torch.float64), atol=1e-6)


def test_constant_levels_rise_from_near_minus_one_to_one() -> None:
    levels = constant_levels(torch.device("cpu"))
    assert len(levels) == 256
    assert bool((levels.diff() > 0).all())
    assert levels[-1] == 1.0
    assert levels[127] == 0.0


def test_nearest_level_is_taken() -> None:
    weight = weight_of(16, 256)
    packed = Nf4().pack(weight)
    codes = torch.stack([packed["codes"] >> 4, packed["codes"] & 15], dim=1).view(-1, 64).long()
    scaled = weight.view(-1, 64) / weight.view(-1, 64).abs().amax(dim=1, keepdim=True)
    levels = torch.tensor(LEVELS)
    taken = (scaled - levels[codes]).abs()
    nearest = (scaled.unsqueeze(-1) - levels).abs().amin(dim=-1)
    assert torch.allclose(taken, nearest, atol=1e-6)


def test_packed_bytes_do_not_depend_on_the_number_of_threads() -> None:
    weight = weight_of(2048, 1600)  # 51200 constants: more than torch sums with one thread
    before = torch.get_num_threads()
    try:
        packs = []
        for num_threads in (1, 3):
            torch.set_num_threads(num_threads)
            packs.append(Nf4().pack(weight))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(packs[0][key], packs[1][key]) for key in packs[0])


def test_odd_number_of_weights_is_refused_with_the_way_out() -> None:
    with pytest.raises(QuantizationError, match=r"\[3, 5\] weight of 15 elements; choose int8"):
        Nf4().pack(torch.randn(3, 5))


def test_kernel_that_gives_other_values_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    @ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 3, *[ctypes.c_longlong] * 3)
    def wrong(codes: int, absmax: int, out: int, block: int, rows: int, columns: int) -> None:
        ctypes.memset(out, 0, 2 * rows * columns)

    class Library:
        cdequantize_blockwise_cpu_nf4_bf16 = wrong

    monkeypatch.setattr(native, "_cpu_library", Library)
    native.nf4_kernel.cache_clear()
    try:
        assert native.nf4_kernel(torch.bfloat16, torch.device("cpu"), unpack_in_torch) is None
        # This library has no such function at all.
        assert native.nf4_kernel(torch.float32, torch.device("cpu"), unpack_in_torch) is None
    finally:
        native.nf4_kernel.cache_clear()


def test_tables_made_in_inference_mode_serve_training() -> None:
    for cached in (nf4_levels.pairs, nf4_levels.constant_levels):
        cached.cache_clear()
    release_workspace()
    with torch.inference_mode():
        Nf4().unpack(Nf4().pack(weight_of(4, 96)), torch.empty(4, 96))
    assert not nf4_levels.constant_levels(torch.device("cpu")).is_inference()
    assert not nf4_levels.pairs(torch.device("cpu")).is_inference()


# bitsandbytes' import warns and is slow, and with it peft changes what it imports: one child process does it all.
_AGAINST_BITSANDBYTES = """
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit, quantize_blockwise
from edge_node.quantize import native
from edge_node.quantize.nf4 import Nf4, unpack_in_torch
from edge_node.quantize.nf4_levels import constant_levels

generator = torch.Generator().manual_seed(0)
scheme = Nf4()
for out_features, in_features in ((64, 256), (48, 100), (7, 6), (300, 512)):
    for dtype in (torch.float32, torch.bfloat16):
        weight = (torch.randn(out_features, in_features, generator=generator) * 0.02).to(dtype)
        packed = scheme.pack(weight)
        theirs, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
        assert torch.equal(theirs.view(-1), packed["codes"])
        assert torch.allclose(state.offset, packed["nested_offset"], rtol=2e-7, atol=0)
        assert torch.equal(state.state2.code, constant_levels(weight.device))
        # Their mean depends on the number of threads: constants are compared with ours taken away.
        _, plain = quantize_4bit(weight, blocksize=64, compress_statistics=False, quant_type="nf4")
        nested, nested_state = quantize_blockwise(plain.absmax - packed["nested_offset"], blocksize=256)
        assert torch.equal(nested_state.absmax, packed["nested_absmax"])
        # Its CPU kernel rounds to 16 bits before it looks for the nearest level: near the middle between two it may
        # take the other one.
        largest = packed["nested_absmax"].repeat_interleave(256)[:len(nested)]
        differs = (nested != packed["absmax"]) & (largest > 0)
        scaled = (plain.absmax - packed["nested_offset"])[differs] / largest[differs]
        levels = constant_levels(weight.device)
        theirs_off, ours_off = (
            (scaled - levels[codes[differs].int()]).abs() for codes in (nested, packed["absmax"]))
        assert (ours_off <= theirs_off).all() and (theirs_off - ours_off < 4e-5).all()
        assert differs.sum() <= 1 + len(nested) // 100
        # Both ways: what they packed is unpacked by us, and the other way round, to the same bits.
        for out_dtype in (torch.float32, torch.bfloat16, torch.float16):
            state.dtype = out_dtype
            theirs_here = scheme.unpack(
                {"codes": theirs.view(-1), "absmax": state.absmax, "nested_absmax": state.state2.absmax,
                 "nested_offset": state.offset}, torch.empty(out_features, in_features, dtype=out_dtype))
            assert torch.equal(theirs_here, dequantize_4bit(theirs, state))
            state2 = QuantState(absmax=packed["nested_absmax"], blocksize=256, code=constant_levels(weight.device),
                                dtype=torch.float32)
            ours = QuantState(absmax=packed["absmax"], shape=weight.shape, dtype=out_dtype, blocksize=64,
                              code=state.code, quant_type="nf4", offset=packed["nested_offset"], state2=state2)
            here = scheme.unpack(packed, torch.empty(out_features, in_features, dtype=out_dtype))
            assert torch.equal(dequantize_4bit(packed["codes"].view(-1, 1), ours), here)
kernels = [native.nf4_kernel(dtype, torch.device("cpu"), unpack_in_torch) is not None
           for dtype in (torch.float32, torch.bfloat16, torch.float16)]
print("kernels", kernels)
"""


def test_bytes_and_values_are_those_of_bitsandbytes() -> None:
    if native.importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    child = subprocess.run(
        [sys.executable, "-c", _AGAINST_BITSANDBYTES],
        # It would compile its quantisation anew for every shape.
        env={**os.environ, "TORCHDYNAMO_DISABLE": "1"},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    assert "kernels [True, True, " in child.stdout
