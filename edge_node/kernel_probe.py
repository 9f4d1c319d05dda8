"""The heavy part of a doctor, a process of its own: runs real kernels, because an import proves nothing.

A wheel for another processor imports well and dies in its first kernel (SIGILL), a CUDA build without kernels for the
card raises in it. So every probe prints one line of JSON when it is done, and what is missing is what killed it::

    python -m edge_node.kernel_probe --threads 4
    {"imports": {...}}  {"fp32": {...}}  {"bf16": {...}}  {"step": {...}}  {"cuda": {...}}  {"mps": {...}}
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

_ROWS, _WIDTH = 128, 512
_LEAST_S = 0.2
"""Each timing is repeated so long and the fastest counts: on a busy machine most repetitions measure the others."""


def main() -> None:
    """Run all probes; each is told on stdout at once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, required=True)
    for name, result in _probes(parser.parse_args().threads):
        print(json.dumps({name: result}), flush=True)


def _probes(threads: int) -> Iterator[tuple[str, dict[str, Any]]]:
    started_s = time.perf_counter()
    import torch

    from edge_node.hardware import describe_cpu

    torch.set_num_threads(threads)
    hardware = describe_cpu(torch.backends.cpu.get_cpu_capability())
    yield "imports", {"seconds": time.perf_counter() - started_s, "hardware": asdict(hardware)}
    for name in ("fp32", "bf16"):
        yield name, _linear("cpu", name)
    yield "step", _step()
    if torch.cuda.is_available():
        yield "cuda", _card()
    if torch.backends.mps.is_available():
        yield "mps", _linear("mps", "fp32")


def _linear(device: str, dtype_name: str) -> dict[str, Any]:
    """A linear layer forward and backward: seconds, GFLOP/s, and how far its result is from that in fp64."""
    import torch

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype_name]
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(_ROWS, _WIDTH, generator=generator)
    weight = torch.randn(_WIDTH, _WIDTH, generator=generator) / _WIDTH**0.5
    x, w, g = (tensor.to(device=device, dtype=dtype, copy=True) for tensor in (rows, weight, rows))
    forward_s = _fastest_s(lambda: x @ w.T, device)
    # The frozen layer's backward: only the gradient of its input.
    backward_s = _fastest_s(lambda: g @ w, device)
    exact = rows.double() @ weight.double().T
    x.requires_grad_(True)
    result = torch.nn.functional.linear(x, w)
    result.backward(g)
    assert x.grad is not None
    exact_gradient = rows.double() @ weight.double()
    flops = 2 * _ROWS * _WIDTH * _WIDTH
    return {
        "forward_s": forward_s,
        "backward_s": backward_s,
        "forward_gflops": flops / forward_s / 1e9,
        "backward_gflops": flops / backward_s / 1e9,
        "error": max(_relative(result.detach(), exact), _relative(x.grad, exact_gradient)),
    }


def _relative(found: Any, exact: Any) -> float:
    """Largest difference against the largest value; infinite where something is not finite."""
    found = found.double().cpu()
    if not bool(found.isfinite().all()):
        return float("inf")
    return float((found - exact).abs().max() / exact.abs().max())


def _step() -> dict[str, Any]:
    """A whole stage of a tiny model with LoRA, forward and backward, as a worker runs it."""
    started_s = time.perf_counter()
    from edge_node.guard import resident_bytes
    from edge_node.profile import warm_up

    imported_s = time.perf_counter()
    warm_up()
    return {
        "imports_s": imported_s - started_s,
        "seconds": time.perf_counter() - imported_s,
        "resident_bytes": resident_bytes(),
    }


def _card() -> dict[str, Any]:
    """The first CUDA card; an error of its kernels is a result, too."""
    from edge_node.hardware import describe_cuda

    try:
        return {
            "hardware": asdict(describe_cuda(0)),
            "fp32": _linear("cuda", "fp32"),
            "bf16": _linear("cuda", "bf16"),
        }
    except RuntimeError as error:
        return {"error": str(error).splitlines()[0]}


def _fastest_s(call: Callable[[], Any], device: str) -> float:
    import torch

    wait: Callable[[], Any] = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device, lambda: None)
    call()
    wait()
    fastest_s, spent_s, repeats = float("inf"), 0.0, 0
    while repeats < 3 or spent_s < _LEAST_S:
        started_s = time.perf_counter()
        call()
        wait()
        took_s = time.perf_counter() - started_s
        fastest_s, spent_s, repeats = min(fastest_s, took_s), spent_s + took_s, repeats + 1
    return fastest_s


if __name__ == "__main__":
    main()
