"""What a lossy codec does to the hidden states at a block border, done inside a stage that has the border within it.

A numerics record may say that hidden states and their gradients cross some borders in bf16. Where a stage ends there
the codec rounds them; where a plan puts both blocks into one stage, they are rounded in place. So the bits of a job
follow from its record, and not from its cuts.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class _RoundedToBf16(torch.autograd.Function):
    """The nearest bf16 numbers in the input's own dtype, both of values and of gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.to(torch.bfloat16).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gradient,) = gradients
        return gradient.to(torch.bfloat16).to(gradient.dtype)


def round_inputs(blocks: Iterable[nn.Module]) -> list[RemovableHandle]:
    """Round what these blocks get from the one before, in every pass, until the handles are removed."""
    return [block.register_forward_pre_hook(_round_first, with_kwargs=True) for block in blocks]


def _round_first(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (rounded_to_bf16(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": rounded_to_bf16(kwargs["hidden_states"])}


def rounded_to_bf16(values: Tensor) -> Tensor:
    """The nearest bf16 numbers in the values' own dtype; their gradient is rounded on its way back, too."""
    return cast(Tensor, _RoundedToBf16.apply(values))  # type: ignore[no-untyped-call]
