"""Frozen linear layers to compare: ours by scheme, plain bf16, and those of libraries that can be imported.

Each builder takes a bf16 weight [out_features, in_features] and gives a module from bf16 activations to bf16 output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edge_node.quantize.int4 import Int4
from edge_node.quantize.int8 import Int8
from edge_node.quantize.linear import QuantLinear
from edge_node.quantize.native import nf4_kernel
from edge_node.quantize.nf4 import Nf4, unpack_in_torch

REFERENCE = "bf16"


@dataclass(frozen=True, slots=True)
class Layer:
    """One contender's layer."""

    module: nn.Module
    held_bytes: int
    """Bytes of the frozen weight with all its constants."""


Build = Callable[[Tensor], Layer]


def builders() -> tuple[dict[str, Build], dict[str, str]]:
    """Contenders by name, the reference first, and why others are missing, by library."""
    found: dict[str, Build] = {REFERENCE: _plain, f"{REFERENCE} again": _plain}
    missing: dict[str, str] = {}
    found["int8"] = lambda weight: _ours(QuantLinear.from_weight(Int8(), weight))
    if nf4_kernel(torch.bfloat16, torch.device("cpu"), unpack_in_torch) is not None:
        found["nf4, bitsandbytes' kernel"] = lambda weight: _ours(QuantLinear.from_weight(Nf4(), weight))
    else:
        missing["nf4, bitsandbytes' kernel"] = "no kernel that gives the same bits"
    found["nf4, torch alone"] = lambda weight: _ours(QuantLinear.from_weight(Nf4(has_native=False), weight))
    found["int4"] = lambda weight: _ours(QuantLinear.from_weight(Int4(), weight))
    for library, find in (
        ("bitsandbytes", _bitsandbytes),
        ("torchao", _torchao),
        ("hqq", _hqq),
        ("optimum-quanto", _quanto),
    ):
        try:
            found |= find()
        except ImportError as error:
            missing[library] = str(error)
    return found, missing


def _plain(weight: Tensor) -> Layer:
    return Layer(_linear(weight), weight.nbytes)


def _ours(layer: QuantLinear) -> Layer:
    return Layer(layer, layer.packed_bytes)


def _linear(weight: Tensor) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def _bitsandbytes() -> dict[str, Build]:
    import bitsandbytes as bnb

    def nf4(weight: Tensor) -> Layer:
        layer: Any = bnb.nn.Linear4bit(
            weight.shape[1], weight.shape[0], bias=False, compute_dtype=weight.dtype, quant_type="nf4"
        )
        # Otherwise its first evaluation pass repacks the weight, and gradients to the input are lost for ever.
        layer.support_avx512bf16_for_cpu = False
        layer.weight = bnb.nn.Params4bit(
            weight.clone(), requires_grad=False, quant_type="nf4", compress_statistics=True
        )
        layer = layer.to("cpu")
        state = layer.weight.quant_state
        constants = (state.absmax, state.offset, state.state2.absmax)
        return Layer(layer, layer.weight.nbytes + sum(constant.nbytes for constant in constants))

    def int8(weight: Tensor) -> Layer:
        layer: Any = bnb.nn.Linear8bitLt(weight.shape[1], weight.shape[0], bias=False, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(weight.half(), requires_grad=False, has_fp16_weights=False)
        layer = layer.to("cpu")
        return Layer(layer, layer.weight.data.nbytes + layer.weight.SCB.nbytes)

    return {"bitsandbytes nf4": nf4, "bitsandbytes int8": int8}


def _torchao() -> dict[str, Build]:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    def int8(weight: Tensor) -> Layer:
        linear = _linear(weight.clone())
        quantize_(linear, Int8WeightOnlyConfig(set_inductor_config=False))
        linear.weight.requires_grad_(False)
        held: Any = linear.weight
        names: list[str] = held.tensor_data_names
        return Layer(linear, sum(getattr(held, name).nbytes for name in names))

    return {"torchao int8": int8}


def _hqq() -> dict[str, Build]:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    def int4(weight: Tensor) -> Layer:
        layer: Any = HQQLinear(
            _linear(weight.clone()),
            BaseQuantizeConfig(nbits=4, group_size=64),
            compute_dtype=weight.dtype,
            device="cpu",
        )
        constants = (layer.meta["scale"], layer.meta["zero"])
        return Layer(layer, layer.W_q.nbytes + sum(constant.nbytes for constant in constants))

    return {"hqq int4": int4}


def _quanto() -> dict[str, Build]:
    from optimum.quanto import QLinear, freeze, qint8

    def int8(weight: Tensor) -> Layer:
        layer: Any = QLinear.from_module(_linear(weight.clone()), weights=qint8)
        freeze(layer)
        layer.weight.requires_grad_(False)
        return Layer(layer, layer.weight._data.nbytes + layer.weight._scale.nbytes)

    return {"optimum-quanto int8": int8}
