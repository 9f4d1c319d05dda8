"""Kernels that a child process ran (:mod:`edge_node.kernel_probe`): started and bounded here, and judged, purely."""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from plutino.doctor.child import ChildRun, run_child
from plutino.doctor.report import Finding, fail, ok, warn
from plutino.dtypes import offered_dtypes
from plutino.sizes import format_size

PROBE_COMMAND = (sys.executable, "-m", "edge_node.kernel_probe")
PROBE_TIMEOUT_S = 300.0
"""Imports alone take minutes on a slow card reader."""

_ERROR_BOUNDS = {"fp32": 1e-5, "bf16": 2e-2}
"""Relative to fp64; bf16 keeps 8 bits, and its sums are rounded once more."""
_CPU_ONLY = "pip install --force-reinstall torch --index-url URL, with PyTorch's index of CPU wheels as URL"


def run_kernels(threads: int, command: Sequence[str] = PROBE_COMMAND, timeout_s: float = PROBE_TIMEOUT_S) -> ChildRun:
    """Run the probes to their end.

    Args:
        threads: intra-op threads, as a worker would have them.
        command: program; ``--threads N`` is appended.
        timeout_s: after so long it is killed.
    """
    # As a worker's: threads that spin for each other on cores that others use measure the others.
    environment = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    return run_child([*command, "--threads", str(threads)], timeout_s=timeout_s, environment=environment)


def judge_kernels(run: ChildRun, *, extra: str = "device") -> list[Finding]:
    """Which dtypes work, which is fast and why, and whether a worker's step runs.

    Args:
        run: what the child told.
        extra: plutino's optional dependencies that bring torch on this side.
    """
    findings: list[Finding] = []
    for name in ("imports", "fp32", "bf16", "step"):
        if name not in run.results:
            return [*findings, _killed(name, run, extra)]
        if name == "imports":
            findings.append(ok("torch", f"imported in {run.results[name]['seconds']:.1f} s"))
        elif name == "step":
            step = run.results[name]
            resident = format_size(step["resident_bytes"])
            said = f"tiny model with LoRA, forward and backward, in {step['seconds']:.1f} s; a worker holds {resident}"
            findings.append(ok("training step", said))
        else:
            findings.append(_judge_dtype(f"{name} kernels", name, run.results[name]))
    findings.append(_judge_fast(run.results))
    findings += _judge_cards(run.results)
    if run.exit_code:
        # The processor's probes are complete: what died later was an accelerator's.
        findings.append(_killed("accelerator", run, extra))
    return findings


def fast_dtypes(results: Mapping[str, Any]) -> list[str]:
    """What the agent offers to jobs, by the backward pass, fastest first."""
    return list(offered_dtypes({name: float(results[name]["backward_s"]) for name in ("fp32", "bf16")}))


def _judge_dtype(what: str, dtype: str, result: Mapping[str, Any]) -> Finding:
    said = (
        f"forward {result['forward_gflops']:.3g} GFLOP/s, backward {result['backward_gflops']:.3g} GFLOP/s, "
        f"error {result['error']:.1g}"
    )
    if not result["error"] <= _ERROR_BOUNDS[dtype]:
        return fail(what, f"{said}; at most {_ERROR_BOUNDS[dtype]:.0e} is right", _CPU_ONLY)
    return ok(what, said)


def _judge_fast(results: Mapping[str, Any]) -> Finding:
    forward, backward = (float(results["fp32"][f"{way}_s"]) / float(results["bf16"][f"{way}_s"]) for way in _WAYS)
    hardware = results["imports"]["hardware"]
    units = [flag for flag in ("amx_bf16", "avx512_bf16", "bf16", "sve2") if flag in hardware["arithmetic"].split()]
    has = f"this processor has {', '.join(units)}" if units else "this processor has no bf16 units"
    said = f"bf16 takes {1 / forward:.2g} x fp32's time forward and {1 / backward:.2g} x backward: {has}"
    return ok("fast dtype", f"{fast_dtypes(results)[0]} ({said}, kernels {hardware['capability']})")


_WAYS = ("forward", "backward")


def _judge_cards(results: Mapping[str, Any]) -> list[Finding]:
    idle = results["imports"]["hardware"]["idle_accelerators"]
    if "cuda" in results:
        card = results["cuda"]
        if "error" in card:
            fix = "install the torch build for this card and its driver: PyTorch's table, or NVIDIA's Jetson index"
            return [fail("CUDA", card["error"], fix)]
        hardware = card["hardware"]
        name = (
            f"{hardware['name']}, compute capability {hardware['capability']}, {format_size(hardware['memory_bytes'])}"
        )
        return [
            ok("CUDA", name),
            *(_judge_dtype(f"CUDA {dtype} kernels", dtype, card[dtype]) for dtype in ("fp32", "bf16")),
        ]
    if "mps" in results:
        said = f"forward {results['mps']['forward_gflops']:.3g} GFLOP/s; workers compute on the processor"
        return [warn("MPS", said, "nothing to do: no job uses Apple's GPU yet")]
    if any(name.startswith("cuda") for name in idle):
        fix = "nvidia-smi; then install a torch build with CUDA (pip install torch, or NVIDIA's Jetson index)"
        return [warn("CUDA", f"{', '.join(idle)} is there, but torch does not see it", fix)]
    return [ok("accelerator", "none; workers compute on the processor")]


def _killed(name: str, run: ChildRun, extra: str) -> Finding:
    what = "torch" if name == "imports" else "training step" if name == "step" else f"{name} kernels"
    if run.timed_out:
        return fail(what, f"did not finish within {PROBE_TIMEOUT_S:.0f} s", "end other programs here and repeat")
    if run.exit_code == -signal.SIGILL:
        return fail(what, "illegal instruction: this torch is built for another processor", _CPU_ONLY)
    if run.exit_code < 0:
        return fail(what, f"killed by {signal.Signals(-run.exit_code).name}; {run.reason}", _CPU_ONLY)
    return fail(what, run.reason, f"pip install 'plutino[{extra}]'")
