"""Packed layers on a CUDA card: time against a bf16 layer, with our kernels and by torch alone.

    python -m benchmarks.quantize_cuda --out DIR

Forward and backward of one frozen layer, in turns with a bf16 ``nn.Linear``, timed by the card's events; what counts
is the median over turns of the ratio to that layer. A second bf16 layer shows what the card calls no difference.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.measure import MIN_TURNS, RESULTS_DIR, machine_facts, write_results
from edge_node.quantize.base import Scheme
from edge_node.quantize.int4 import Int4
from edge_node.quantize.int8 import Int8
from edge_node.quantize.linear import QuantLinear
from edge_node.quantize.nf4 import Nf4

SHAPES = ((8192, 8192), (4096, 14336))
"""(in_features, out_features)."""
NUM_TOKENS = (256, 2048)
SCHEMES: dict[str, Scheme] = {
    "int8": Int8(),
    "nf4": Nf4(),
    "nf4, torch alone": Nf4(has_native=False),
    "int4": Int4(),
    "int4, torch alone": Int4(has_native=False),
}
_PASSES_A_TURN = 5


def main(arguments: list[str] | None = None) -> int:
    """Command line; gives the process's exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantize_cuda", description=__doc__)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS_DIR, help="folder for the figures")
    options = parser.parse_args(arguments)
    if options.turns < MIN_TURNS:
        parser.error(f"{options.turns} turns give no figure worth quoting; take at least {MIN_TURNS}")
    machine = {**machine_facts(("torch", "triton")), "card": torch.cuda.get_device_name()}
    cases: list[dict[str, object]] = []
    for in_features, out_features in SHAPES:
        for num_tokens in NUM_TOKENS:
            case = measure(in_features, out_features, num_tokens, options.turns)
            cases.append(case)
            print(case_table(case))
            write_results(options.out / "quantize_cuda.json", {"machine": machine, "cases": cases})
    return 0


def measure(in_features: int, out_features: int, num_tokens: int, num_turns: int) -> dict[str, object]:
    """All contenders at one shape, in turns; times in milliseconds a pass."""
    weight = (torch.randn(out_features, in_features, device="cuda") * 0.02).bfloat16()
    x = torch.randn(num_tokens, in_features, device="cuda").bfloat16().requires_grad_()
    gradient = torch.randn(num_tokens, out_features, device="cuda").bfloat16()
    layers: dict[str, nn.Module] = {"bf16": _plain(weight), "bf16 again": _plain(weight)}
    layers |= {name: QuantLinear.from_weight(scheme, weight) for name, scheme in SCHEMES.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in layers}
    for turn in range(num_turns + 1):
        for name in layers if turn % 2 else reversed(list(layers)):
            found = _turn_ms(layers[name], x, gradient)
            if turn:  # the first compiles and allocates
                times[name].append(found)
    contenders = {}
    for name, of_layer in times.items():
        ratios = [sum(one) / sum(other) for one, other in zip(of_layer, times["bf16"], strict=True)]
        contenders[name] = {
            "forward_ms": statistics.median(forward for forward, _ in of_layer),
            "backward_ms": statistics.median(backward for _, backward in of_layer),
            "ratio": statistics.median(ratios),
        }
    return {"in_features": in_features, "out_features": out_features, "num_tokens": num_tokens, "layers": contenders}


def case_table(case: dict[str, object]) -> str:
    """Plain text: a line a contender."""
    layers = case["layers"]
    assert isinstance(layers, dict)
    head = f"{case['in_features']}->{case['out_features']}, {case['num_tokens']} tokens"
    lines = [f"{head:<28} {'forward':>8} {'backward':>9} {'ratio':>6}"]
    lines += [
        f"  {name:<26} {one['forward_ms']:>5.2f} ms {one['backward_ms']:>6.2f} ms {one['ratio']:>6.2f}"
        for name, one in layers.items()
    ]
    return "\n".join(lines)


def _plain(weight: Tensor) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def _turn_ms(layer: nn.Module, x: Tensor, gradient: Tensor) -> tuple[float, float]:
    """Milliseconds of a forward and of a backward pass, means over some."""
    outputs: list[Tensor] = []

    def backward() -> None:
        x.grad = None
        outputs.pop().backward(gradient)

    forward_ms = _timed_ms(lambda: outputs.append(layer(x)))
    return forward_ms, _timed_ms(backward)


def _timed_ms(call: Callable[[], None]) -> float:
    started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    started.record()
    for _ in range(_PASSES_A_TURN):
        call()
    ended.record()
    torch.cuda.synchronize()
    return float(started.elapsed_time(ended)) / _PASSES_A_TURN


if __name__ == "__main__":
    sys.exit(main())
