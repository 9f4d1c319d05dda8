"""What every scheme of the registry must keep when its layer is trained through: two of it are other libraries' traps.

Layers here have at least two tiles of rows where that matters, set by shrinking the tile.
"""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from edge_node.quantize import linear
from edge_node.quantize.base import packed_bytes
from edge_node.quantize.linear import QuantLinear
from edge_node.quantize.registry import SCHEMES
from edge_node.quantize.workspace import held_workspace_bytes, release_workspace

OUT, IN, TOKENS = 192, 256, 24

pytestmark = pytest.mark.filterwarnings("error")
every_scheme = pytest.mark.parametrize("name", list(SCHEMES))
one_or_more_tiles = pytest.mark.parametrize("tile_elements", [1 << 24, 64 * IN], ids=["whole", "tiles"])


def make_weight(out_features: int = OUT, in_features: int = IN, *, seed: int = 0) -> Tensor:
    return torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed)) * 0.02


def make_pair(
    name: str, *, bias: bool = True, compute_dtype: torch.dtype | None = None
) -> tuple[QuantLinear, nn.Linear]:
    """A packed layer and the unpacked one it stands for."""
    b = make_weight(1, OUT, seed=1)[0] if bias else None
    layer = QuantLinear.from_weight(SCHEMES[name], make_weight(), b, compute_dtype=compute_dtype)
    reference = nn.Linear(IN, OUT, bias=bias)
    reference.weight = nn.Parameter(layer.dequantize(), requires_grad=False)
    if b is not None:
        reference.bias = nn.Parameter(b, requires_grad=False)
    return layer, reference


def make_input(dtype: torch.dtype = torch.float32, *, seed: int = 2) -> Tensor:
    return make_weight(TOKENS, IN, seed=seed).mul(50).to(dtype).view(2, TOKENS // 2, IN).requires_grad_()


def run(layer: nn.Module, x: Tensor, *, seed: int = 3) -> tuple[Tensor, Tensor]:
    """Output, and the input's gradient for a random output gradient."""
    x = x.detach().requires_grad_()
    y = layer(x)
    y.backward(make_weight(TOKENS, OUT, seed=seed).to(y.dtype).view(y.shape))
    assert x.grad is not None
    return y.detach(), x.grad


def tensors_alive() -> list[Tensor]:
    # By type: isinstance asks every object for its __class__, at which some of torch's warn.
    return [obj for obj in gc.get_objects() if issubclass(type(obj), Tensor)]


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


@every_scheme
@one_or_more_tiles
def test_output_and_input_gradient_in_fp32_are_those_of_the_dequantised_linear(
    name: str, tile_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "TILE_ELEMENTS", tile_elements)
    layer, reference = make_pair(name)
    for found, expected in zip(run(layer, make_input()), run(reference, make_input()), strict=True):
        assert relative(found, expected) < 1e-6


@every_scheme
@one_or_more_tiles
@pytest.mark.parametrize("compute_dtype", [None, torch.float32])
def test_bf16_activations_give_bf16_output_and_gradient_near_fp32(
    name: str, tile_elements: int, compute_dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "TILE_ELEMENTS", tile_elements)
    layer, reference = make_pair(name, compute_dtype=compute_dtype)
    found = run(layer, make_input(torch.bfloat16))
    expected = run(reference, make_input(torch.bfloat16).float())
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.bfloat16
        # bf16 rounds by up to 2^-9 = 2e-3: weights, incoming gradient and result.
        assert relative(one, other) < 6e-3


@every_scheme
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_gradient_after_an_evaluation_pass_is_that_before_it(name: str, mode: type, dtype: torch.dtype) -> None:
    layer, reference = make_pair(name)
    before = run(layer, make_input(dtype))
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    fresh = copy.deepcopy(layer)
    release_workspace()  # so that the evaluation pass is the one that makes it
    for _ in range(2):
        for module in (layer, fresh):
            module.eval()
            with mode():
                module(make_input(dtype).detach())
                module(make_input(dtype).detach()[:1, :1])
            module.train()
            for one, other in zip(run(module, make_input(dtype)), before, strict=True):
                assert torch.equal(one, other)
    gradient, expected = before[1].float().flatten(), run(reference, make_input(dtype).float())[1].flatten()
    assert torch.cosine_similarity(gradient, expected, dim=0) > 0.9999
    assert all(torch.equal(value, state[key]) for key, value in layer.state_dict().items())


@every_scheme
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_nothing_of_the_weights_size_lives_between_forward_and_backward(name: str, dtype: torch.dtype) -> None:
    layer, _ = make_pair(name)
    x = make_input(dtype)
    layer(x).sum().backward()  # the workspace exists from here on
    known = {id(tensor) for tensor in tensors_alive()}
    held_bytes = held_workspace_bytes()
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    gc.collect()
    new = [tensor for tensor in tensors_alive() if id(tensor) not in known]
    assert saved == []
    assert {tensor.untyped_storage().data_ptr() for tensor in new} == {y.untyped_storage().data_ptr()}
    assert held_workspace_bytes() == held_bytes


@every_scheme
def test_input_is_not_kept_for_the_backward_pass(name: str) -> None:
    layer, _ = make_pair(name)
    x = make_input()
    inner = x * 1.0
    watched = weakref.ref(inner)
    y = layer(inner)
    del inner
    gc.collect()
    assert watched() is None
    y.sum().backward()
    assert x.grad is not None


@every_scheme
def test_no_gradient_but_the_inputs_is_formed(name: str) -> None:
    layer, _ = make_pair(name)
    run(layer, make_input())
    assert all(not tensor.requires_grad and tensor.grad is None for tensor in (*layer.buffers(), *layer.parameters()))
    assert not layer(make_input().detach()).requires_grad


@every_scheme
def test_a_trained_bias_gets_its_gradient(name: str) -> None:
    layer, reference = make_pair(name)
    layer.bias.requires_grad_()
    reference.bias.requires_grad_()
    expected = run(reference, make_input())
    found = run(layer, make_input())
    assert relative(found[0], expected[0]) < 1e-6
    assert layer.bias.grad is not None
    assert reference.bias.grad is not None
    assert relative(layer.bias.grad, reference.bias.grad) < 1e-6


@every_scheme
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("compute_dtype", [None, torch.float32])
def test_output_may_be_added_to_in_place(name: str, dtype: torch.dtype, compute_dtype: torch.dtype | None) -> None:
    layer, _ = make_pair(name, compute_dtype=compute_dtype)
    expected = run(layer, make_input(dtype))[1]
    x = make_input(dtype).detach().requires_grad_()
    y = layer(x).add_(1)
    y.backward(make_weight(TOKENS, OUT, seed=3).to(y.dtype).view(y.shape))
    assert x.grad is not None
    assert torch.equal(x.grad, expected)


@every_scheme
@pytest.mark.parametrize("shape", [(IN,), (0, IN), (2, 0, IN), (1, 2, 3, IN)])
def test_any_leading_shape_goes_through(name: str, shape: tuple[int, ...]) -> None:
    layer, reference = make_pair(name)
    x = torch.ones(shape).requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert torch.allclose(y, reference(torch.ones(shape)), atol=1e-5)
    assert x.grad is not None
    assert x.grad.shape == x.shape


@every_scheme
def test_checkpointing_gives_the_same_bits(name: str) -> None:
    layer, _ = make_pair(name)

    class Checkpointed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(layer, x, use_reentrant=False)

    for one, other in zip(run(Checkpointed(), make_input()), run(layer, make_input()), strict=True):
        assert torch.equal(one, other)


@every_scheme
def test_threads_do_not_disturb_each_other(name: str) -> None:
    layers = [make_pair(name)[0], QuantLinear.from_weight(SCHEMES[name], make_weight(seed=9))]
    expected = [[run(layer, make_input(seed=seed)) for seed in range(4)] for layer in layers]
    wrong: list[str] = []

    def work(seed: int) -> None:
        for turn in range(12):
            index = (turn + seed) % 2
            found = run(layers[index], make_input(seed=seed))
            if not all(torch.equal(a, b) for a, b in zip(found, expected[index][seed], strict=True)):
                wrong.append(f"thread {seed}, turn {turn}")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []


@every_scheme
def test_state_dict_brings_the_packed_tensors_back_bit_for_bit(name: str) -> None:
    layer, _ = make_pair(name)
    other = QuantLinear.from_weight(SCHEMES[name], make_weight(seed=8), make_weight(1, OUT, seed=7)[0])
    other.load_state_dict(layer.state_dict())
    assert all(torch.equal(other.packed[key], value) for key, value in layer.packed.items())
    assert layer.packed_bytes == packed_bytes(SCHEMES[name], OUT, IN)
    rebuilt = QuantLinear(SCHEMES[name], OUT, IN, layer.packed, layer.bias)
    assert torch.equal(rebuilt(make_input()), layer(make_input()))


@every_scheme
def test_casting_the_module_does_not_touch_its_constants(name: str) -> None:
    layer, _ = make_pair(name)
    before = layer.dequantize()
    layer.to(torch.bfloat16)
    assert torch.equal(layer.dequantize(), before)
    assert layer.bias.dtype == torch.bfloat16


@every_scheme
def test_weight_is_a_stand_in_that_cannot_be_used_unnoticed(name: str) -> None:
    layer, _ = make_pair(name)
    assert layer.weight.shape == (OUT, IN)
    assert layer.weight.untyped_storage().nbytes() == 4
    assert layer.weight.isnan().all()
    with pytest.raises(RuntimeError):
        layer.weight.add_(1)
    assert "weight" not in layer.state_dict()


@every_scheme
def test_peft_puts_lora_on_it_and_its_gradients_are_those_on_the_dequantised_linear(name: str) -> None:
    gradients = []
    for base in make_pair(name):
        model = nn.Sequential()
        model.add_module("proj", base)
        peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["proj"], init_lora_weights=False), model)
        for index, parameter in enumerate(model.proj.lora_A.parameters()):
            parameter.data = make_weight(*parameter.shape, seed=20 + index)
        for index, parameter in enumerate(model.proj.lora_B.parameters()):
            parameter.data = make_weight(*parameter.shape, seed=30 + index)
        run(model, make_input())
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert len(gradients[0]) == len(gradients[1]) == 2
    for found, expected in zip(*gradients, strict=True):
        assert relative(found, expected) < 1e-6
