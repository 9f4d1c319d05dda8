"""Integer products: near the layer's own values, refused where a gradient would get lost."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from edge_node.quantize import integer_product
from edge_node.quantize.integer_product import check_integer_product
from edge_node.quantize.linear import QuantLinear
from edge_node.quantize.registry import SCHEMES
from plutino.errors import QuantizationError

OUT, IN = 96, 256


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer_of(name: str = "int8", *, bias: bool = False) -> QuantLinear:
    weight, bias_values = gaussian(OUT, IN) * 0.02, gaussian(OUT, seed=1) if bias else None
    return QuantLinear.from_weight(SCHEMES[name], weight, bias_values)


def as_integers(layer: QuantLinear) -> QuantLinear:
    return QuantLinear(layer.scheme, OUT, IN, layer.packed, layer.bias, products="integer")


def forward_only(layer: QuantLinear, x: Tensor) -> Tensor:
    return as_integers(layer)(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_values_are_the_layers_up_to_the_rounding_of_activations(dtype: torch.dtype, bias: bool) -> None:
    layer = layer_of(bias=bias)
    x = gaussian(3, 5, IN, seed=2).to(dtype)
    found, expected = forward_only(layer, x), layer(x)
    assert found.dtype == dtype
    assert found.shape == (3, 5, OUT)
    # A token's step is a 127th of its largest value, 2.8 standard deviations: 2.8 / 127 / sqrt(12).
    assert (found.float() - expected.float()).norm() < 0.01 * expected.float().norm()


def test_values_are_exact_for_activations_that_are_codes() -> None:
    layer = layer_of()
    codes = torch.randint(-127, 128, (4, IN), generator=torch.Generator().manual_seed(0))
    codes[:, 0] = 127
    x = codes.float() * 2.0**-6
    expected = x.double() @ layer.dequantize(torch.float64).t()
    assert torch.allclose(forward_only(layer, x).double(), expected, rtol=1e-6, atol=1e-9)


def test_token_of_zeros_gives_zeros() -> None:
    x = gaussian(2, IN)
    x[0] = 0
    y = forward_only(layer_of(), x)
    assert bool((y[0] == 0).all())
    assert bool(y.isfinite().all())


def test_pieces_give_what_the_whole_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = layer_of(bias=True), gaussian(37, IN)
    whole = forward_only(layer, x)
    monkeypatch.setattr(integer_product, "scratch_elements", lambda device: 5 * IN)
    assert torch.equal(forward_only(layer, x), whole)


def test_input_that_wants_a_gradient_is_refused() -> None:
    with pytest.raises(QuantizationError, match="no gradient"):
        forward_only(layer_of(), gaussian(2, IN).requires_grad_())


def test_other_schemes_are_refused_with_the_way_out() -> None:
    with pytest.raises(QuantizationError, match="not nf4; set quantization: int8"):
        forward_only(layer_of("nf4"), gaussian(2, IN))


def test_pass_without_autograd_may_have_an_input_that_wants_a_gradient_elsewhere() -> None:
    with torch.no_grad():
        assert not forward_only(layer_of(), gaussian(2, IN).requires_grad_()).requires_grad


def test_sizes_that_cuda_cannot_multiply_are_refused_before_anything_is_read() -> None:
    check_integer_product(96, 250, torch.device("cpu"))
    with pytest.raises(QuantizationError, match=r"multiples of 8, not \[96, 250\]; set model.integer_products: never"):
        check_integer_product(96, 250, torch.device("cuda"))
