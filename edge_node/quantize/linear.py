"""A frozen linear layer whose weight is packed: the base layer that adapters are put on.

Libraries' layers lose the input's gradient after one evaluation pass, or keep the dequantised weight in the graph until
the backward pass. This one saves nothing: forward and backward each dequantise tiles of output rows into one workspace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from edge_node.quantize.base import RowScaled, Scheme, check_packed, row_tiles
from edge_node.quantize.int8 import Int8
from edge_node.quantize.integer_product import integer_product
from edge_node.quantize.workspace import TILE_ELEMENTS, workspace
from plutino.errors import QuantizationError

if TYPE_CHECKING:
    # Layers run where specs are not read, and pydantic is not installed.
    from plutino.job.model import Products


class QuantLinear(nn.Linear):
    """y = x W^T + b with a packed, frozen W [out_features, in_features].

    An ``nn.Linear`` to whoever asks, so that peft puts its adapters on it, with the packed tensors as buffers under
    their scheme's names. There is no weight: :attr:`weight` is a stand-in of its shape.

    Args:
        scheme: how the weight is packed.
        out_features: rows of W.
        in_features: columns of W.
        packed: the scheme's tensors; kept, not copied.
        bias: [out_features] or None; kept, not trained.
        compute_dtype: dtype of W in the matrix products; None: that of the activations.
        products: how it multiplies: by the dequantised W, or integers by integers, which gives no gradient.

    Raises:
        QuantizationError: the packed tensors are not those of such a weight, or integers are to be multiplied and the
            scheme is not int8.
    """

    def __init__(
        self,
        scheme: Scheme,
        out_features: int,
        in_features: int,
        packed: Mapping[str, Tensor],
        bias: Tensor | None = None,
        *,
        compute_dtype: torch.dtype | None = None,
        products: Products = "dequantised",
    ) -> None:
        # nn.Linear's own constructor would allocate a weight.
        nn.Module.__init__(self)
        check_packed(scheme, out_features, in_features, packed)
        if products == "integer" and not isinstance(scheme, Int8):
            raise QuantizationError(f"integer products need int8 weights, not {scheme.name}; set quantization: int8")
        self.scheme = scheme
        self.products = products
        self.out_features = out_features
        self.in_features = in_features
        self.compute_dtype = compute_dtype
        self._packed_names = tuple(packed)
        for name, tensor in packed.items():
            self.register_buffer(name, tensor.detach())
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
        self.eval()

    @classmethod
    def from_weight(
        cls, scheme: Scheme, weight: Tensor, bias: Tensor | None = None, *, compute_dtype: torch.dtype | None = None
    ) -> QuantLinear:
        """Quantise a floating weight [out_features, in_features].

        Raises:
            QuantizationError: the scheme cannot hold it.
        """
        out_features, in_features = weight.shape
        return cls(scheme, out_features, in_features, scheme.pack(weight), bias, compute_dtype=compute_dtype)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """One NaN, seen as [out_features, in_features]: shape, dtype and device are asked for, values must not be.

        peft moves new adapters to the weight's device, so a meta tensor would not do. Whoever computes with this one
        gets NaN, whoever writes to it an error.
        """
        device = next(iter(self.packed.values())).device
        dtype = self.compute_dtype or torch.get_default_dtype()
        return torch.full((), torch.nan, dtype=dtype, device=device).expand(self.out_features, self.in_features)

    @property
    def packed(self) -> dict[str, Tensor]:
        """The scheme's tensors, the module's own."""
        return {name: self.get_buffer(name) for name in self._packed_names}

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed tensors."""
        return sum(tensor.nbytes for tensor in self.packed.values())

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight in memory of its own."""
        packed = self.packed
        device = next(iter(packed.values())).device
        out = torch.empty(self.out_features, self.in_features, dtype=dtype, device=device)
        return self.scheme.unpack(packed, out)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features], in the dtype of ``x``.

        Raises:
            QuantizationError: integers are multiplied, but ``x`` wants a gradient, which would get lost without a word.
        """
        bias: Tensor | None = self.bias
        if self.products == "integer":
            if torch.is_grad_enabled() and x.requires_grad:
                raise QuantizationError(
                    "integer products have no gradient, but the layer's input wants one; set "
                    "model.integer_products: never"
                )
            return integer_product(x, self.packed, bias)
        if bias is not None and bias.requires_grad:
            return _frozen_product(x, self, None) + bias.to(x.dtype)
        return _frozen_product(x, self, bias)

    def extra_repr(self) -> str:
        """Shape and scheme, as ``print(model)`` shows them."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"scheme={self.scheme.name}, products={self.products}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        """Move packed tensors, but never cast them: ``module.to(torch.bfloat16)`` would round scales."""
        packed = self.packed
        for name in packed:
            del self._buffers[name]
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            for name, tensor in packed.items():
                applied = fn(tensor)
                packed[name] = applied if applied.dtype == tensor.dtype else tensor.to(applied.device)
        finally:
            for name, tensor in packed.items():
                self.register_buffer(name, tensor)
        return self


class _FrozenProduct(torch.autograd.Function):
    """x W^T + b with a gradient to x alone; saves the module and no tensor."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, module: QuantLinear, bias: Tensor | None) -> Tensor:
        ctx.module = module  # type: ignore[attr-defined]
        dtype = module.compute_dtype or x.dtype
        rows = x.reshape(-1, module.in_features).to(dtype)
        # The result itself, no view of it: families add to a layer's output in place, which autograd refuses of views.
        y = torch.empty(*x.shape[:-1], module.out_features, dtype=dtype, device=x.device)
        flat = y.view(len(rows), module.out_features)
        scales = _row_scales(module, dtype)
        bias = None if bias is None else bias.to(dtype)
        for start, end, weight in _weight_tiles(module, dtype, x.device):
            tile = flat[:, start:end]
            if bias is None or scales is not None:
                torch.mm(rows, weight.t(), out=tile)
            else:
                torch.addmm(bias[start:end], rows, weight.t(), out=tile)
            if scales is not None:
                tile.mul_(scales[start:end])
                if bias is not None:
                    tile.add_(bias[start:end])
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None
        (gradient,) = gradients
        module: QuantLinear = ctx.module
        dtype = module.compute_dtype or gradient.dtype
        rows = gradient.reshape(-1, module.out_features).to(dtype)
        scales = _row_scales(module, dtype)
        if scales is not None:
            rows = rows * scales
        total: Tensor | None = None
        for start, end, weight in _weight_tiles(module, dtype, gradient.device):
            part = torch.mm(rows[:, start:end], weight)
            if start == 0 and end == module.out_features:
                total = part
            # Sums of several tiles in fp32: in bf16 every further tile would round once more.
            elif total is None:
                total = part.float()
            else:
                total += part
        assert total is not None
        return total.to(gradient.dtype).view(*gradient.shape[:-1], module.in_features), None, None


def _frozen_product(x: Tensor, module: QuantLinear, bias: Tensor | None) -> Tensor:
    return cast(Tensor, _FrozenProduct.apply(x, module, bias))  # type: ignore[no-untyped-call]


def _weight_tiles(module: QuantLinear, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[int, int, Tensor]]:
    """Ranges of output rows with their dequantised weight, which the next range overwrites."""
    scheme, packed = module.scheme, module.packed
    multiple = scheme.row_multiple(module.in_features)
    for start, end in row_tiles(module.out_features, module.in_features, multiple=multiple, max_elements=TILE_ELEMENTS):
        out = workspace("weight", (end - start) * module.in_features, dtype, device).view(end - start, -1)
        if isinstance(scheme, RowScaled) and dtype != torch.float16:
            yield start, end, scheme.unpack_codes(packed, out, start_row=start)
        else:
            yield start, end, scheme.unpack(packed, out, start_row=start)


def _row_scales(module: QuantLinear, dtype: torch.dtype) -> Tensor | None:
    """Scales to apply to the output instead of to the weight; None: the tiles are the weight itself."""
    if not isinstance(module.scheme, RowScaled) or dtype == torch.float16:
        return None
    return module.scheme.row_scales(module.packed).to(dtype)
