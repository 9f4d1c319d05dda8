"""Our arithmetic of LoRA on one layer against peft's own."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from edge_node.methods.lora_linear import use_lean_lora

IN_FEATURES, OUT_FEATURES = 48, 80


def linear(bias):
    return nn.Linear(IN_FEATURES, OUT_FEATURES, bias=bias)


LAYERS = {"linear": lambda: linear(False), "bias": lambda: linear(True), "conv1d": lambda: Conv1D(OUT_FEATURES, 48)}


def adapted_layer(make, *, dtype, alpha):
    """A peft LoRA layer with an adapter that changes something."""
    torch.manual_seed(0)
    base = nn.Sequential(make()).to(dtype).requires_grad_(False)
    config = peft.LoraConfig(r=4, lora_alpha=alpha, target_modules=["0"], fan_in_fan_out=isinstance(base[0], Conv1D))
    peft.inject_adapter_in_model(config, base)
    layer = base[0]
    for part in (layer.lora_A, layer.lora_B):
        part.default.float()
        nn.init.normal_(part.default.weight, std=0.1)
    return layer


def lean(layer):
    twin = copy.deepcopy(layer)
    use_lean_lora(twin, "default")
    return twin


def run(layer, x, gradient):
    """Output and gradients of input, A and B."""
    x = x.clone().requires_grad_(True)
    output = layer(x)
    output.backward(gradient)
    return output.detach(), x.grad, layer.lora_A.default.weight.grad, layer.lora_B.default.weight.grad


def inputs(dtype):
    torch.manual_seed(1)
    return torch.randn(2, 7, IN_FEATURES, dtype=dtype), torch.randn(2, 7, OUT_FEATURES, dtype=dtype)


@pytest.mark.parametrize("alpha", [8, 5.5])
@pytest.mark.parametrize("name", LAYERS)
def test_lean_lora_in_fp32_equals_peft_to_the_bit(name, alpha):
    layer = adapted_layer(LAYERS[name], dtype=torch.float32, alpha=alpha)

    own, theirs = (run(one, *inputs(torch.float32)) for one in (lean(layer), layer))

    assert all(torch.equal(a, b) for a, b in zip(own, theirs, strict=True))


@pytest.mark.parametrize("name", LAYERS)
def test_lean_lora_in_bf16_stays_within_bf16_rounding_of_peft_and_keeps_fp32_gradients(name):
    layer = adapted_layer(LAYERS[name], dtype=torch.bfloat16, alpha=8)

    own, theirs = (run(one, *inputs(torch.bfloat16)) for one in (lean(layer), layer))

    assert [t.dtype for t in own] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    for mine, other in zip(own, theirs, strict=True):
        # bf16 keeps 8 bits: each of the few roundings on the way moves a value by at most 2**-9 of it.
        assert (mine.float() - other.float()).norm() <= 2**-7 * other.float().norm()


def test_lean_lora_trains_where_no_gradient_goes_further_down():
    layer = lean(adapted_layer(LAYERS["linear"], dtype=torch.float32, alpha=8))
    x, gradient = inputs(torch.float32)

    layer(x).backward(gradient)

    assert x.grad is None
    assert layer.lora_A.default.weight.grad.abs().sum() > 0


def test_lean_lora_switched_off_gives_the_frozen_layer():
    layer = lean(adapted_layer(LAYERS["bias"], dtype=torch.float32, alpha=8))
    x, _ = inputs(torch.float32)
    layer.enable_adapters(False)

    assert torch.equal(layer(x), layer.base_layer(x))
