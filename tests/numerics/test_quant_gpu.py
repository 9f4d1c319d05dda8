"""Packed layers on CUDA against the CPU: the same packed bytes, the same dequantised bits, near results."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from edge_node.quantize.fused import int4_launch, nf4_launch
from edge_node.quantize.int4 import Int4
from edge_node.quantize.int4 import _unpack_without_kernel as int4_in_torch
from edge_node.quantize.linear import QuantLinear
from edge_node.quantize.nf4 import Nf4
from edge_node.quantize.nf4 import _unpack_without_kernel as nf4_in_torch
from edge_node.quantize.registry import SCHEMES

pytestmark = pytest.mark.gpu
every_scheme = pytest.mark.parametrize("name", list(SCHEMES))
OUT, IN, TOKENS = 768, 1024, 96


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@every_scheme
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packing_on_cuda_gives_the_bytes_of_the_cpu(name: str, dtype: torch.dtype) -> None:
    weight = (gaussian(OUT, IN) * 0.02).to(dtype)
    here, there = SCHEMES[name].pack(weight), SCHEMES[name].pack(weight.cuda())
    for key, tensor in here.items():
        assert torch.equal(there[key].cpu(), tensor), key


@every_scheme
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dequantised_weight_is_that_of_the_cpu_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    layer = QuantLinear.from_weight(SCHEMES[name], gaussian(OUT, IN) * 0.02)
    here = layer.dequantize(dtype)
    assert torch.equal(layer.cuda().dequantize(dtype).cpu(), here)


@every_scheme
@pytest.mark.parametrize(
    # fp32: sums in another order. bf16: and roundings of 2^-9 where a sum lies between two values.
    ("dtype", "most"),
    [(torch.float32, 2e-6), (torch.bfloat16, 3e-3)],
)
def test_output_and_gradient_are_those_of_the_cpu(name: str, dtype: torch.dtype, most: float) -> None:
    layer = QuantLinear.from_weight(SCHEMES[name], gaussian(OUT, IN) * 0.02, gaussian(OUT, seed=1))
    results = []
    for device in ("cpu", "cuda"):
        layer.to(device)
        with torch.inference_mode():
            layer(gaussian(TOKENS, IN, seed=2).to(device, dtype))
        x = gaussian(TOKENS, IN, seed=2).to(device, dtype).requires_grad_()
        y = layer(x)
        y.backward(gaussian(TOKENS, OUT, seed=3).to(device, dtype))
        assert x.grad is not None
        results.append((y.detach().float().cpu(), x.grad.float().cpu()))
    for here, there in zip(*results, strict=True):
        assert (there - here).norm() <= most * here.norm()


@every_scheme
def test_nothing_of_the_weights_size_lives_between_forward_and_backward(name: str) -> None:
    layer = QuantLinear.from_weight(SCHEMES[name], gaussian(4096, 4096) * 0.02).cuda()
    x = gaussian(16, 4096).cuda().bfloat16().requires_grad_()
    layer(x).sum().backward()
    x.grad = None
    torch.cuda.synchronize()
    before_bytes = torch.cuda.memory_allocated()
    y = layer(x)
    torch.cuda.synchronize()
    # The output, in the allocator's units of 512 bytes.
    assert torch.cuda.memory_allocated() - before_bytes <= y.nbytes + 512
    y.sum().backward()


@pytest.mark.parametrize("tokens", [3, TOKENS])
def test_integer_products_are_those_of_the_cpu(tokens: int) -> None:
    packed = SCHEMES["int8"].pack(gaussian(OUT, IN) * 0.02)
    layer = QuantLinear(SCHEMES["int8"], OUT, IN, packed, gaussian(OUT, seed=1), products="integer")
    x = gaussian(tokens, IN, seed=2)
    here = layer(x)
    there = layer.cuda()(x.cuda()).cpu()
    assert torch.allclose(there, here, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fused_kernels_are_used_where_triton_is_and_give_torchs_bits(dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    card = torch.device("cuda", torch.cuda.current_device())
    for launch in (nf4_launch, int4_launch):
        launch.cache_clear()
    for fused, plain in ((Nf4(), Nf4(has_native=False)), (Int4(), Int4(has_native=False))):
        # Blocks of nf4 that end inside a row, and rows that no program of the kernel fills.
        shapes = ((OUT, IN), (33, 384), (3, 128), *(((5, 70),) if fused.name == "nf4" else ()))
        for shape in shapes:
            packed = fused.pack((gaussian(*shape) * 0.02).cuda())
            for start_row in (0, fused.row_multiple(shape[1])):
                if start_row >= shape[0]:
                    continue
                found, expected = (torch.empty(shape[0] - start_row, shape[1], dtype=dtype).cuda() for _ in range(2))
                fused.unpack(packed, found, start_row=start_row)
                plain.unpack(packed, expected, start_row=start_row)
                assert torch.equal(found, expected), (fused.name, shape, start_row)
    # Each is held against torch once, not with every product.
    for launch in (nf4_launch, int4_launch):
        assert launch.cache_info().misses == 1 < launch.cache_info().hits
    assert nf4_launch(dtype, card, nf4_in_torch) is not None
    assert int4_launch(dtype, card, int4_in_torch) is not None
    assert nf4_launch.cache_info().misses == int4_launch.cache_info().misses == 1
