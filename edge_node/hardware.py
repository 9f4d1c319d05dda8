"""What this device computes with: read from the machine, and from torch only where torch decides.

Two processors round alike only if the libraries choose the same kernels for them; that is what
:attr:`Hardware.arithmetic` gathers. Entry points: :func:`describe_cpu`, :func:`describe_cuda`.
"""

from __future__ import annotations

import platform
import re
import sys
from pathlib import Path

from plutino.hardware import Hardware

_DECIDING_FLAGS = (
    "avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "avx_vnni",
    "asimd", "asimdhp", "asimddp", "bf16", "i8mm", "sve", "sve2", "sme",
)  # fmt: skip
"""Extensions by which MKL, oneDNN, the Arm Compute Library and ATen choose between kernels."""


def describe_cpu(capability: str, proc: Path = Path("/proc")) -> Hardware:
    """A device whose workers compute on its processor.

    Args:
        capability: what torch chose its own kernels by (``torch.backends.cpu.get_cpu_capability()``).
        proc: where procfs is mounted.
    """
    cpuinfo = _cpuinfo(proc / "cpuinfo")
    machine = platform.machine()
    flags = (cpuinfo.get("flags") or cpuinfo.get("Features") or "").split()
    vendor = cpuinfo.get("vendor_id") or cpuinfo.get("CPU part") or platform.processor()
    parts = ("cpu", machine, vendor, capability, *(flag for flag in _DECIDING_FLAGS if flag in flags))
    return Hardware(
        kind="cpu",
        name=cpuinfo.get("model name") or _board_name(proc) or platform.processor() or machine,
        machine=machine,
        capability=capability,
        arithmetic=" ".join(part for part in parts if part),
        idle_accelerators=idle_accelerators(proc),
    )


def describe_cuda(index: int) -> Hardware:
    """A device whose workers compute on a CUDA card; makes a CUDA context in the calling process.

    Raises:
        RuntimeError: torch sees no such card.
    """
    import torch

    card = torch.cuda.get_device_properties(index)
    return Hardware(
        kind="cuda",
        name=str(card.name),
        machine=platform.machine(),
        capability=f"{card.major}.{card.minor}",
        # cuBLAS chooses by the number of multiprocessors, too.
        arithmetic=f"cuda {card.name} sm_{card.major}{card.minor} x{card.multi_processor_count} "
        f"CUDA {torch.version.cuda}",
        memory_bytes=int(card.total_memory),
    )


def idle_accelerators(proc: Path = Path("/proc")) -> tuple[str, ...]:
    """Names of accelerators that the system shows, found without loading a driver."""
    found = []
    for information in sorted((proc / "driver" / "nvidia" / "gpus").glob("*/information")):
        match = re.search(r"^Model:\s*(.+)$", _text(information), re.MULTILINE)
        found.append(f"cuda {match[1].strip() if match else information.parent.name}")
    # Jetsons show their GPU as part of the chip, not in the driver's list of cards.
    if not found and "tegra" in _board_compatible(proc):
        found.append(f"cuda {_board_name(proc)}")
    if sys.platform == "darwin" and platform.machine() == "arm64":
        found.append("mps Apple silicon")
    return tuple(found)


def _cpuinfo(path: Path) -> dict[str, str]:
    """The first processor's lines; empty without procfs."""
    values: dict[str, str] = {}
    for line in _text(path).splitlines():
        name, colon, value = line.partition(":")
        if colon and name.strip() not in values:
            values[name.strip()] = value.strip()
    return values


def _board_name(proc: Path) -> str:
    return _text(proc / "device-tree" / "model").strip("\0 \n")


def _board_compatible(proc: Path) -> str:
    return _text(proc / "device-tree" / "compatible")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
