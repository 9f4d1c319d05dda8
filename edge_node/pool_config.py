"""What the owner of a device gives to its workers, and what the first of them told of the device."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edge_node.network import DeviceNetwork
from edge_node.weights_config import WeightsConfig
from plutino.hardware import Hardware


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolConfig:
    """What the owner of a device gives to workers."""

    memory_budget_bytes: int
    """Bound on the resident memory of all workers together."""
    threads: int
    """Threads of each worker."""
    device: str = "cpu"
    """Where workers compute: cpu, or cuda:N, whose memory is then what the budget bounds."""
    worker_command: Sequence[str] = (sys.executable, "-m", "edge_node.worker")
    """Program that is a worker; ``--events-fd N --threads T`` is appended."""
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    """What workers may use for weights."""
    stop_grace_s: float = 2.0
    """Time between SIGTERM and SIGKILL."""
    spare_settle_s: float = 15.0
    """Time that a job's worker gets to load before a spare's imports may compete with it."""
    network: DeviceNetwork = field(default_factory=DeviceNetwork)
    """How workers reach the coordinator and each other."""
    ready_timeout_s: float = 300.0
    """Longest time for a worker's imports; minutes on a slow disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Readiness:
    """What the first worker told of itself when its imports were done."""

    baseline_bytes: int
    dtypes: tuple[str, ...]
    """Offered to jobs, fastest first."""
    slow_dtypes: dict[str, float]
    """Kept back, with the factor over fp32's seconds."""
    versions: dict[str, str]
    hardware: Hardware

    @classmethod
    def from_values(cls, told: Mapping[str, Any]) -> Readiness:
        """Of the worker's words.

        Raises:
            ValueError: they are others than this version's.
        """
        match told:
            case {
                "baseline_bytes": int(baseline_bytes),
                "dtypes": [*dtypes],
                "versions": dict(versions),
                "hardware": dict(hardware),
            }:
                return cls(
                    baseline_bytes=baseline_bytes,
                    dtypes=tuple(str(dtype) for dtype in dtypes),
                    slow_dtypes={str(dtype): float(factor) for dtype, factor in told.get("slow_dtypes", {}).items()},
                    versions={str(name): str(version) for name, version in versions.items()},
                    hardware=Hardware.from_values(hardware),
                )
            case _:
                raise ValueError(f"a worker says of itself {str(told)[:200]}, which this version does not understand")
