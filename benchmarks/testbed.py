"""Unequal devices on one Linux machine, as a fleet file describes them, under a real coordinator.

A device becomes an agent process: as many processors of its own as it has threads, its memory as the agent's budget,
links of the file's rates and latencies through :mod:`benchmarks.relay`, which needs no root. The device with the most
operations a second and thread gets all of its processors' time, others their share of it, by a cgroup where one can be
made and by fewer processors where not. What could not be had is in :attr:`LocalFleet.notes`. Model folders are read
from the disk that all share, and the way to the coordinator is not slowed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from benchmarks.agent_processors import agent_processors
from benchmarks.cores import pinned, unused
from benchmarks.relay import USE_SUFFIX, Host, RelayPlan, way_name
from benchmarks.relay_carrier import Way
from benchmarks.relay_use import RelayUse, read_use, use_note
from benchmarks.stack import PlutinoStack
from benchmarks.tcp_sockets import listing_refusal
from coordinator.demo.children import Children
from partitioner.device import LinkProfile
from partitioner.fleet_file import FleetFile
from plutino.errors import ConfigError

_LINKS_TIMEOUT_S = 20.0
_MOST_AGENTS = 100
_NETS = 254


def relay_plan(fleet: FleetFile, state_dir: Path, number: int) -> RelayPlan:
    """Who is reached where, and how quickly.

    Args:
        fleet: the devices and links.
        state_dir: of the stack.
        number: of this fleet: others on this machine at the same time have other addresses.
    """
    net = f"127.{1 + number // _NETS % _NETS}.{1 + number % _NETS}"
    names = [name for device in fleet.devices for name in device.names]
    if len(names) > _MOST_AGENTS:
        raise ConfigError(f"{len(names)} devices have no loopback addresses of their own; take {_MOST_AGENTS} at most")
    hosts = tuple(
        Host(
            name=name,
            listens=f"{net}.{i}",
            advertises=f"{net}.{_MOST_AGENTS + i}",
            mark=str(state_dir / "agents" / name),
        )
        for i, name in enumerate(names, start=1)
    )
    table = fleet.link_table()
    ways = {
        way_name(source, target): _way(link.link)
        for link in table.measured
        for source, target in (link.agent_ids, link.agent_ids[::-1])
    }
    return RelayPlan(hosts=hosts, other=_way(table.other), ways=ways)


def _way(link: LinkProfile) -> Way:
    return Way(bytes_per_s=link.bandwidth_bytes_per_s, latency_s=link.latency_s)


class LocalFleet:
    """A coordinator and a fleet's agents; leaving the ``with`` block ends every process.

    Args:
        fleet: what to be like.
        state_dir: an existing, empty folder.
        cores: processors for all of it; with 9 or more the coordinator gets two that no agent has, and the links'
            emulator those two and whatever the agents leave.
        has_links: False leaves the links as quick as loopback is.
        device: where the agents' workers compute.
        quota: of a processor for each thread, see :func:`benchmarks.agent_processors.agent_processes`.
    """

    def __init__(
        self,
        fleet: FleetFile,
        state_dir: Path,
        *,
        cores: Sequence[int],
        has_links: bool = True,
        device: str = "cpu",
        quota: float | None = None,
    ) -> None:
        self._fleet, self._state_dir, self._device = fleet, state_dir, device
        self._processors = agent_processors(fleet, cores, quota=quota)
        self.own_cores = self._processors.own
        self.notes = list(self._processors.notes)
        self.relay_cores = sorted({*self.own_cores, *unused(self._processors.cores, self._processors.available)})
        self._relay_use: tuple[float, list[RelayUse]] | None = None
        unable = listing_refusal() if has_links else None
        self._has_links = has_links and unable is None
        if unable is not None:
            self.notes.append(f"links are as quick as loopback: {unable}")
        if self._processors.is_short:
            self.notes.append(f"agents share {len(self._processors.available)} processors: no time says anything")
        self._ending = ExitStack()
        self.stack = PlutinoStack(state_dir)

    def __enter__(self) -> LocalFleet:
        """Start everything, and wait until all agents are in and their links are known.

        Raises:
            PlutinoError: something does not start.
        """
        with ExitStack() as ending:
            quotas = {name: ending.enter_context(quota) for name, quota in self._processors.quotas().items()}
            with pinned(self.relay_cores):
                hosts = self._start_relay(ending) if self._has_links else None
            with pinned(self.own_cores):
                ending.enter_context(self.stack)
            self.stack.start_agents(
                {agent.name: agent.budget_bytes for agent in self._processors.agents},
                device=self._device,
                threads={agent.name: agent.threads for agent in self._processors.agents},
                cores=self._processors.cores,
                quotas=quotas,
                hosts=hosts,
                has_own_caches=True,
            )
            self._wait_for_links()
            self._relay_use = (time.monotonic(), read_use(self._use_path)) if self._has_links else None
            self._ending = ending.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ending.__exit__(kind, error, traceback)

    def _start_relay(self, ending: ExitStack) -> dict[str, tuple[str, str]]:
        plan = relay_plan(self._fleet, self._state_dir, os.getpid())
        path = self._use_path.with_suffix(".json")
        path.write_text(plan.to_json(), encoding="utf-8")
        ending.enter_context(Children(self._state_dir)).start("relay", "-m", "benchmarks.relay", str(path))
        return {host.name: (host.listens, host.advertises) for host in plan.hosts}

    @property
    def _use_path(self) -> Path:
        return self._state_dir / f"relay{USE_SUFFIX}"

    def relay_notes(self) -> list[str]:
        """How busy the links' emulator was since all agents were in: was it the limit? Nothing if there is none."""
        if self._relay_use is None:
            return []
        since_s, before = self._relay_use
        took_s = time.monotonic() - since_s
        return [use_note(before, read_use(self._use_path), took_s, len(self.relay_cores))]

    def _wait_for_links(self) -> None:
        """A plan waits for figures of links, but a fleet that is older than a moment has them."""
        num_agents = len(self._processors.agents)
        deadline_s = time.monotonic() + _LINKS_TIMEOUT_S
        while missing := num_agents * (num_agents - 1) - len(self.links()):
            if time.monotonic() > deadline_s:
                return self.notes.append(f"{missing // 2} links were not measured in time; plans assume something")
            time.sleep(0.1)

    def links(self) -> dict[tuple[str, str], tuple[float, float]]:
        """Bytes a second and latency in seconds between agents, as they measured them; both ways round."""
        found = {}
        for device in self.stack.client.devices():
            for row in device["measured_links"]:
                one, other = row["between"]
                if row["bandwidth_bytes_per_s"] is not None:
                    found[one, other] = found[other, one] = (row["bandwidth_bytes_per_s"], row["latency_s"])
        return found
