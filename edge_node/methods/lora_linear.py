"""LoRA on a linear layer, leaner than autograd's own chain of operations: used through peft's hook for variants.

The arithmetic is that of the LoRA paper (Hu et al. 2021, arXiv 2106.09685): ``result + scaling * B(A(x))``. Kept for
the backward pass are the layer's input, which the layers that read the same input share, and ``A(x)``.

In fp32 every operation is the one that peft's layers would carry out, in their order, so that values and gradients are
theirs to the bit. In bf16 the products are taken in bf16 with fp32 accumulation, as under ``torch.autocast``. There
peft alone would copy the input, the result and its gradient to fp32 and back: on a CPU with bf16 units that costs as
much as the frozen layers themselves. Parameters, and sums of their gradients over micro-batches, are fp32 either way.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor
from torch.autograd.function import once_differentiable

# Shape suffixes: M tokens of all rows, K input features, N output features, R rank.


class LeanLora(LoraVariant):
    """Plain LoRA as peft calls a variant: ``forward`` gets the frozen layer's result and adds the adapter's share."""

    @staticmethod
    def init(module: Any, adapter_name: str) -> None:
        """Nothing to prepare."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """See :class:`peft.tuners.lora.layer.LoraVariant`."""
        added: Tensor = _AddLora.apply(  # type: ignore[no-untyped-call]
            result,
            module.lora_dropout[active_adapter](x),
            module.lora_A[active_adapter].weight,
            module.lora_B[active_adapter].weight,
            module.scaling[active_adapter],
        )
        return added


def use_lean_lora(layer: Any, adapter_name: str) -> None:
    """Let a peft LoRA layer on a linear layer compute its adapter by :class:`LeanLora`."""
    layer.lora_variant[adapter_name] = LeanLora()
    # The variant takes the input as it is; peft would hand it an fp32 copy.
    layer.cast_input_dtype_enabled = False


class _AddLora(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, result: Tensor, x: Tensor, lora_a_RK: Tensor, lora_b_NR: Tensor, scaling: float) -> Tensor:
        x_MK = x.reshape(-1, x.shape[-1])
        reduced_MR = x_MK @ lora_a_RK.to(x.dtype).t()
        # Nothing keeps the frozen layer's result for its backward pass, so its memory is taken over. Without `.data`
        # autograd would see a write into a view where the layer has a bias, and copy. What is returned is no view,
        # because models go on in place (Falcon adds attention's output to the MLP's).
        total = result.data
        sum_MN = total.view(-1, result.shape[-1])
        if x.dtype == torch.float32:
            sum_MN.add_((reduced_MR @ lora_b_NR.t()).mul_(scaling))
        else:
            sum_MN.addmm_(reduced_MR, lora_b_NR.to(x.dtype).t(), alpha=scaling)
        ctx.save_for_backward(x_MK, reduced_MR, lora_a_RK, lora_b_NR)
        ctx.scaling, ctx.x_shape = scaling, x.shape
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x_MK, reduced_MR, lora_a_RK, lora_b_NR = ctx.saved_tensors
        gradient_MN = gradient.reshape(-1, gradient.shape[-1])
        if gradient.dtype == torch.float32:
            scaled_MN = gradient_MN * ctx.scaling
            reduced_gradient_MR = scaled_MN @ lora_b_NR
            gradient_b_NR = scaled_MN.t() @ reduced_MR
            del scaled_MN
        else:
            # Scaling the narrow products instead of the wide gradient.
            reduced_gradient_MR = (gradient_MN @ lora_b_NR.to(gradient.dtype)).mul_(ctx.scaling)
            gradient_b_NR = (gradient_MN.t() @ reduced_MR).float().mul_(ctx.scaling)
        gradient_a_RK = (reduced_gradient_MR.t() @ x_MK).float()
        gradient_x = None
        if ctx.needs_input_grad[1]:
            gradient_x = (reduced_gradient_MR @ lora_a_RK.to(gradient.dtype)).view(ctx.x_shape)
        return gradient, gradient_x, gradient_a_RK, gradient_b_NR, None
