"""How quick the ways between devices are: measured while they are idle, kept pair by pair with its age.

:func:`due_pairs` decides, purely, which pairs are measured next; :class:`LinkMap` lets devices do it
(:mod:`coordinator.fleet.doors`) and answers planners and people.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coordinator.fleet.doors import measure, open_door
from coordinator.fleet.membership import Device
from coordinator.fleet.registry import FleetRegistry
from partitioner.device import LinkProfile, LinkTable, MeasuredLink
from plutino.doctor.burst import MEASURE_TIMEOUT_S, LinkFigures
from plutino.doctor.door import DOOR_S
from plutino.errors import AgentError, AgentLostError
from plutino.types import AgentId

logger = logging.getLogger(__name__)

REFRESH_S = 600.0
"""A figure this old is measured again while both devices are idle."""
RETRY_S = 60.0
"""The same for a pair that did not reach each other."""
MAX_DEVICES = 64
"""Of a larger fleet only so many, those that offer the most memory, are measured: 2016 pairs."""
WAIT_S = 5.0
"""Longest time that a plan waits for pairs that were never measured."""

_LOOK_EVERY_S = 1.0

Pair = tuple[AgentId, AgentId]
"""Two devices, the lesser id first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkRecord:
    """What is known of the way between two devices."""

    figures: LinkFigures | None
    error: str
    """Why it could not be measured, whoever dialled; empty if it could."""
    measured_at_s: float
    streams: tuple[int, int]
    """The streams that both were attached with: who comes back may have moved to another network."""


def pair_of(one: AgentId, other: AgentId) -> Pair:
    """The name of a pair."""
    return (one, other) if one < other else (other, one)


def due_pairs(
    devices: Sequence[Device],
    streams: Mapping[AgentId, int],
    busy: Collection[str],
    records: Mapping[Pair, LinkRecord],
    now_s: float,
) -> list[Pair]:
    """Pairs to measure now, the unknown and then the oldest first, no two of which share a device or a host.

    Args:
        devices: devices that are in.
        streams: with which stream each is attached.
        busy: ids of devices and hosts that must be left alone.
        records: what is known.
        now_s: of the records' clock.
    """
    able = sorted((d for d in devices if d.measures_links), key=lambda d: (-d.memory_budget_bytes, d.agent_id))
    idle = [d for d in able[:MAX_DEVICES] if d.agent_id not in busy and d.host_id not in busy]
    due: list[tuple[float, Pair, set[str]]] = []
    for i, one in enumerate(idle):
        for other in idle[:i]:
            pair = pair_of(one.agent_id, other.agent_id)
            record = records.get(pair)
            due_at_s = float("-inf")
            if record is not None and record.streams == (streams[pair[0]], streams[pair[1]]):
                due_at_s = record.measured_at_s + (RETRY_S if record.error else REFRESH_S)
            if due_at_s <= now_s:
                due.append((due_at_s, pair, {one.agent_id, other.agent_id, one.host_id, other.host_id}))
    chosen: list[Pair] = []
    taken: set[str] = set()
    for _, pair, needed in sorted(due, key=lambda entry: entry[:2]):
        if not needed & taken:
            taken |= needed
            chosen.append(pair)
    return chosen


class LinkMap:
    """All ways that are known. Use it on one event loop."""

    def __init__(self, fleet: FleetRegistry, *, has_tls: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._fleet = fleet
        self._has_tls = has_tls
        self._clock = clock
        self._records: dict[Pair, LinkRecord] = {}
        self._doors: dict[AgentId, tuple[str, float]] = {}
        self._measuring: dict[Pair, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()

    async def run(self) -> None:
        """Run forever: measure what is due while the devices have nothing else to do."""
        try:
            while True:
                self._changed.clear()
                self._begin()
                try:
                    await asyncio.wait_for(self._changed.wait(), _LOOK_EVERY_S)
                except asyncio.TimeoutError:
                    continue
        finally:
            for task in self._measuring.values():
                task.cancel()
            await asyncio.gather(*self._measuring.values(), return_exceptions=True)

    async def known_among(self, agent_ids: Iterable[AgentId], within_s: float = WAIT_S) -> None:
        """Wait until every pair of these that can be measured was tried once, but no longer than ``within_s``."""
        wanted = set(agent_ids)
        deadline_s = self._clock() + within_s
        self._begin()
        while self._clock() < deadline_s and any(
            pair not in self._records and wanted.issuperset(pair) for pair in (*self._measuring, *self._due())
        ):
            waiting = set(self._measuring.values())
            if not waiting:
                # Nobody is free: both do something else, which may take long.
                return
            await asyncio.wait(
                waiting, timeout=max(0.0, deadline_s - self._clock()), return_when=asyncio.FIRST_COMPLETED
            )
            self._begin()

    def table(self, devices: Sequence[Device]) -> LinkTable:
        """What a planner is told; pairs that were not measured have what is assumed of them."""
        wanted = {device.agent_id for device in devices}
        now_s = self._clock()
        return LinkTable(
            measured=tuple(
                MeasuredLink(
                    agent_ids=pair,
                    link=LinkProfile(
                        bandwidth_bytes_per_s=record.figures.bandwidth_bytes_per_s, latency_s=record.figures.latency_s
                    ),
                    age_s=now_s - record.measured_at_s,
                )
                for pair, record in sorted(self._records.items())
                if record.figures is not None and wanted.issuperset(pair)
            )
        )

    def rows(self) -> list[dict[str, Any]]:
        """Every pair of devices that are in, for people."""
        devices = {device.agent_id: device for device in self._fleet.devices}
        now_s = self._clock()
        return [
            {
                "between": [devices[pair[0]].name, devices[pair[1]].name],
                "agent_ids": list(pair),
                "is_same_host": devices[pair[0]].host_id == devices[pair[1]].host_id,
                "bandwidth_bytes_per_s": None if record.figures is None else record.figures.bandwidth_bytes_per_s,
                "latency_s": None if record.figures is None else record.figures.latency_s,
                "age_s": now_s - record.measured_at_s,
                "error": record.error,
            }
            for pair, record in sorted(self._records.items())
            if pair[0] in devices and pair[1] in devices
        ]

    def _due(self) -> list[Pair]:
        devices = self._fleet.devices
        links = {device.agent_id: self._fleet.link(device.agent_id) for device in devices}
        streams = {agent_id: link.stream for agent_id, link in links.items() if link is not None}
        attached = [device for device in devices if device.agent_id in streams]
        hosts = {device.agent_id: device.host_id for device in devices}
        busy: set[str] = {
            agent_id for agent_id, link in links.items() if link is not None and (link.workers or link.profiles)
        }
        for pair in self._measuring:
            busy |= {*pair, *(hosts[agent_id] for agent_id in pair if agent_id in hosts)}
        return due_pairs(attached, streams, busy, self._records, self._clock())

    def _begin(self) -> None:
        for pair in self._due():
            task = asyncio.create_task(self._measure(pair))
            self._measuring[pair] = task
            task.add_done_callback(lambda _, pair=pair: self._end(pair))  # type: ignore[misc]

    def _end(self, pair: Pair) -> None:
        self._measuring.pop(pair)
        self._changed.set()

    async def _measure(self, pair: Pair) -> None:
        streams = tuple(link.stream for agent_id in pair if (link := self._fleet.link(agent_id)) is not None)
        errors: list[str] = []
        figures = None
        # Which of them will dial depends on the plan; a firewall may let one direction through alone.
        for dialler, other in (pair, pair[::-1]):
            try:
                address = await self._door(other)
                figures = await measure(self._fleet, dialler, address, str(other) if self._has_tls else "")
                break
            except AgentLostError:
                return
            except AgentError as error:
                errors.append(str(error))
        if len(streams) < 2:
            return
        if figures is None:
            logger.info("not measured: %s", "; ".join(errors))
        self._records[pair] = LinkRecord(
            figures=figures,
            error="" if figures is not None else "; ".join(errors),
            measured_at_s=self._clock(),
            streams=(streams[0], streams[1]),
        )

    async def _door(self, agent_id: AgentId) -> str:
        """The address of a door that stays open for a measurement."""
        address, closes_at_s = self._doors.get(agent_id, ("", float("-inf")))
        if closes_at_s - self._clock() < MEASURE_TIMEOUT_S:
            opened_at_s = self._clock()
            address = await open_door(self._fleet, agent_id)
            self._doors[agent_id] = (address, opened_at_s + DOOR_S)
        return address
