"""Which cores or which card a device's workers compute on, found without torch."""

from __future__ import annotations

import os
from collections.abc import Mapping


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
