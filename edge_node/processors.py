"""Which cores or which card a device's workers compute on, and what bounds them there, found without torch."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from plutino.errors import ConfigError
from plutino.sizes import MIB

_ASK_TIMEOUT_S = 20.0


def processors_of(device: str, environment: Mapping[str, str] = os.environ) -> list[str]:
    """Names by which the coordinator sees whether two devices of one host compute on the same.

    Args:
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        environment: where a card's number may be mapped to another (CUDA_VISIBLE_DEVICES).

    Returns:
        Numbers of the cores that this process may run on, or the card; empty where the system does not tell.
    """
    if device == "cpu":
        # Not on macOS; workers inherit what the agent was pinned to.
        affinity = getattr(os, "sched_getaffinity", None)
        return [] if affinity is None else [str(core) for core in sorted(affinity(0))]
    index = int(device.partition(":")[2] or 0)
    visible = [name.strip() for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return [f"card {visible[index] if index < len(visible) else index}"]


def card_memory_bytes(card: str) -> int:
    """Memory of a CUDA card, asked of its driver without making a context.

    Args:
        card: its number or UUID, as nvidia-smi and CUDA_VISIBLE_DEVICES name it.

    Raises:
        ConfigError: nvidia-smi is not there, or knows no such card.
    """
    command = ["nvidia-smi", f"--id={card}", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=_ASK_TIMEOUT_S, check=True)
        return int(asked.stdout.strip()) * MIB
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise ConfigError(
            f"how much memory card {card} has cannot be asked ({error}); say how much of it workers may take: --memory"
        ) from error


def processor_quota(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> float | None:
    """How many processors this process's cgroup allows it, as containers are bounded (``docker run --cpus=0.5``).

    Args:
        proc: where procfs is mounted.
        cgroups: where the cgroups are, of version 1 or 2.

    Returns:
        The least of its own cgroup and of all above it; None where nothing bounds.
    """
    try:
        lines = (proc / "self" / "cgroup").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    allowed: list[float] = []
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        # An empty list of controllers is version 2's only hierarchy; version 1 has one for cpu, maybe with others.
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = cgroups / controllers if controllers else cgroups
        folder = root / path.strip("/")
        for one in (folder, *(above for above in folder.parents if above.is_relative_to(root))):
            found = _quota_of(one)
            allowed += [] if found is None else [found]
    return min(allowed, default=None)


def _quota_of(folder: Path) -> float | None:
    try:
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text(encoding="ascii").strip()
            period = (folder / "cpu.cfs_period_us").read_text(encoding="ascii").strip()
        return None if quota in ("max", "-1") else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None
