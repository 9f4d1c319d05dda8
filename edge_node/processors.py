"""Which cores or which card a device's workers compute on, found without torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


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


def processor_quota(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> list[str]:
    """What limits this process's processor time: cpu.max of its cgroup (version 2) and of every one above it.

    Args:
        proc: where procfs is mounted.
        cgroups: where the cgroups are.

    Returns:
        Each as the kernel tells it (``50000 100000``), innermost first; empty where nothing limits.
    """
    try:
        lines = (proc / "self" / "cgroup").read_text(encoding="ascii").splitlines()
    except OSError:
        return []
    own = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), None)
    if own is None:
        return []
    found = []
    for folder in (cgroups / own, *(cgroups / own).parents):
        path = folder / "cpu.max"
        limit = path.read_text(encoding="ascii").strip() if path.is_file() else ""
        if limit and not limit.startswith("max"):
            found.append(limit)
        if folder == cgroups:
            break
    return found
