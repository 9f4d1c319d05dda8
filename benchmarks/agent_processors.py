"""The processors of the agents that stand for a fleet's devices on one machine: of their own, or shares of them.

What is measured beside plutino on the same fleet gets the same ones, so that its seconds are of the same devices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.cores import apart, one_after_other
from benchmarks.processor_quota import (
    FINE_PERIOD_US,
    FIRST_WEIGHT,
    PERIOD_US,
    SPARE_PROCESSORS,
    ProcessorQuota,
    quota_refusal,
)
from partitioner.fleet_file import FleetFile
from plutino.errors import ConfigError
from plutino.sizes import parse_size

_FAST = 0.95
"""Of the fastest device's speed a thread: not worth a quota."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentProcess:
    """How a device of the fleet runs here."""

    name: str
    budget_bytes: int
    threads: int
    quota_cores: float | None = None
    """Processors that it may use at the most, on those that it is pinned to; None: all of these."""


def agent_processes(
    fleet: FleetFile, *, has_quotas: bool, quota: float | None = None
) -> tuple[list[AgentProcess], list[str]]:
    """The agents that stand for a fleet's devices, and in what they differ from them.

    Args:
        fleet: the devices.
        has_quotas: whether processor time can be bounded here.
        quota: of a processor for each thread of the fastest device, where all share processors: then every device
            computes with one thread; None: they have processors of their own.

    Raises:
        ConfigError: a quota is asked for, and none can be set here, or it is more than one thread can use.
    """
    if quota is not None and not has_quotas:
        raise ConfigError("devices that share processors need a cgroup for each, which root can make")
    most_threads = max(device.threads for device in fleet.devices)
    if quota is not None and not 0 < quota * most_threads <= 1:
        raise ConfigError(
            f"a quota of {quota:g} of a processor for each of {most_threads} threads: a device that shares processors "
            f"computes with one thread; take more than 0 and at most {1 / most_threads:.3g}"
        )
    speeds = [None if device.flops is None else device.flops / device.threads for device in fleet.devices]
    fastest = max((speed for speed in speeds if speed is not None), default=None)
    found: list[AgentProcess] = []
    notes: list[str] = []
    if fastest is None or None in speeds:
        notes.append("devices without flops run as fast as their processors do")
    for device, speed in zip(fleet.devices, speeds, strict=True):
        share = 1.0 if speed is None or fastest is None else speed / fastest
        threads, cores = device.threads, None
        if quota is not None:
            threads, cores = 1, quota * share * device.threads
        elif share < _FAST and has_quotas:
            cores = share * device.threads
            threads = max(1, math.ceil(cores))
        elif share < _FAST:
            threads = max(1, round(share * device.threads))
            if not math.isclose(threads, share * device.threads, rel_tol=0.1):
                wanted = share * device.threads
                notes.append(f"{device.name} has {threads} processors in place of {wanted:.2g}: no quota can be set")
        found += [
            AgentProcess(name=name, budget_bytes=parse_size(device.memory), threads=threads, quota_cores=cores)
            for name in device.names
        ]
    return found, notes


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentProcessors:
    """Who computes where; :func:`agent_processors` shares out."""

    agents: tuple[AgentProcess, ...]
    cores: dict[str, set[int]]
    """Processors that an agent and its workers are pinned to, by name."""
    own: list[int]
    """For the coordinator and whoever measures."""
    available: list[int]
    """For agents."""
    is_short: bool
    """Agents get less than they ask for: no time says anything."""
    notes: tuple[str, ...]
    """In what agents differ from the fleet's devices."""
    quota_weight: int
    quota_period_us: int

    def quotas(self) -> dict[str, ProcessorQuota]:
        """Of the agents whose time is bounded, by name; none is set before its ``with`` block."""
        return {
            agent.name: ProcessorQuota(agent.quota_cores, weight=self.quota_weight, period_us=self.quota_period_us)
            for agent in self.agents
            if agent.quota_cores is not None
        }


def agent_processors(fleet: FleetFile, cores: Sequence[int], *, quota: float | None = None) -> AgentProcessors:
    """Share a machine's processors out to a fleet's agents.

    Args:
        fleet: the devices.
        cores: processors for all of it; with 9 or more the coordinator gets two that no agent has.
        quota: of a processor for each thread, see :func:`agent_processes`.

    Raises:
        ConfigError: see :func:`agent_processes`.
    """
    own, available = apart(cores)
    agents, notes = agent_processes(fleet, has_quotas=quota_refusal() is None, quota=quota)
    threads = {agent.name: agent.threads for agent in agents}
    pinned_to, is_short = one_after_other(threads, available)
    weight, period_us = 1, PERIOD_US
    if quota is not None:
        # Nobody's quota is another's, wherever both compute.
        pinned_to = {name: set(available) for name in threads}
        taken = sum(agent.quota_cores or 0.0 for agent in agents)
        is_short = taken > len(available) - SPARE_PROCESSORS
        notes.append(f"agents have {taken:.2g} processors in all, by quotas of {FINE_PERIOD_US / 1e3:g} ms")
        weight, period_us = FIRST_WEIGHT, FINE_PERIOD_US
    return AgentProcessors(
        agents=tuple(agents),
        cores=pinned_to,
        own=own,
        available=available,
        is_short=is_short,
        notes=tuple(notes),
        quota_weight=weight,
        quota_period_us=period_us,
    )
