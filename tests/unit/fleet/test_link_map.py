from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest

from coordinator.fleet import link_map
from coordinator.fleet.link_map import MAX_DEVICES, REFRESH_S, RETRY_S, LinkMap, LinkRecord, due_pairs, pair_of
from coordinator.fleet.membership import Device
from partitioner.device import BlockTimings, DeviceProfile
from plutino.doctor.burst import LinkFigures, rate_of
from plutino.errors import AgentError
from plutino.types import AgentId, WorkerRef

FIGURES = LinkFigures(latency_s=1e-3, up_bytes_per_s=2e8, down_bytes_per_s=1e8)


def device(name: str, host: str = "", *, measures_links: bool = True) -> Device:
    return Device(
        agent_id=AgentId(name),
        name=f"the {name}",
        host_id=host or name,
        memory_budget_bytes=1 << 30,
        baseline_bytes=1,
        threads=1,
        measures_links=measures_links,
    )


def record(now_s: float, *, error: str = "", streams: tuple[int, int] = (1, 1)) -> LinkRecord:
    return LinkRecord(figures=None if error else FIGURES, error=error, measured_at_s=now_s, streams=streams)


def due(devices: list[Device], *, records=None, busy=(), now_s: float = 0.0) -> list[tuple[str, str]]:
    streams = {one.agent_id: 1 for one in devices}
    return due_pairs(devices, streams, set(busy), records or {}, now_s)


def test_pairs_measured_at_once_share_neither_a_device_nor_a_host():
    devices = [device("a", "one"), device("b", "two"), device("c", "two"), device("d"), device("e")]

    pairs = due(devices)

    ends = [end for pair in pairs for end in pair]
    hosts = [next(one.host_id for one in devices if one.agent_id == end) for end in ends]
    assert len(pairs) == 2
    assert len(set(ends)) == len(ends)
    assert len(set(hosts)) == len(hosts)


def test_busy_devices_and_those_that_cannot_burst_are_left_alone():
    devices = [device("a"), device("b"), device("c", measures_links=False)]

    assert due(devices) == [("a", "b")]
    assert due(devices, busy={"a"}) == []


@pytest.mark.parametrize(("error", "age_s"), [("", REFRESH_S), ("closed", RETRY_S)])
def test_known_pair_is_measured_again_once_it_is_old_and_the_unknown_come_first(error, age_s):
    devices = [device("a"), device("b")]
    records = {pair_of(AgentId("b"), AgentId("a")): record(100.0, error=error)}

    assert due(devices, records=records, now_s=100.0 + age_s - 1) == []
    assert due(devices, records=records, now_s=100.0 + age_s) == [("a", "b")]
    # c's pairs are unknown; only one of the three can run without sharing a device.
    assert due([*devices, device("c")], records=records, now_s=1e6) == [("a", "c")]


def test_device_that_attached_anew_is_measured_again_because_it_may_have_moved():
    records = {(AgentId("a"), AgentId("b")): record(0.0, streams=(1, 7))}

    assert due([device("a"), device("b")], records=records) == [("a", "b")]


def test_large_fleet_measures_a_bounded_number_of_devices():
    devices = [device(f"d{i}") for i in range(3 * MAX_DEVICES)]

    assert len(due(devices)) == MAX_DEVICES // 2


@dataclass
class FakeLink:
    stream: int = 1
    workers: set[WorkerRef] = field(default_factory=set)
    profiles: dict[str, object] = field(default_factory=dict)


class FakeFleet:
    """Devices that are in, and idle."""

    def __init__(self, *devices: Device) -> None:
        self.devices = devices
        self.links = {one.agent_id: FakeLink() for one in devices}

    def link(self, agent_id: AgentId) -> FakeLink | None:
        return self.links.get(agent_id)


def mapped(monkeypatch: pytest.MonkeyPatch, fleet: FakeFleet, closed: set[tuple[str, str]]) -> tuple[LinkMap, list]:
    """A map whose devices reach each other but for ``closed`` (dialler, listener); and who dialled whom."""
    dialled: list[tuple[str, str]] = []

    async def open_door(_fleet: FakeFleet, agent_id: AgentId) -> str:
        return f"{agent_id}:1"

    async def measure(_fleet: FakeFleet, agent_id: AgentId, address: str, node_id: str) -> LinkFigures:
        listener = address.removesuffix(":1")
        dialled.append((agent_id, listener))
        if (agent_id, listener) in closed:
            raise AgentError(f"{agent_id} found {listener} closed")
        return FIGURES

    monkeypatch.setattr(link_map, "open_door", open_door)
    monkeypatch.setattr(link_map, "measure", measure)
    return LinkMap(fleet, has_tls=True, clock=lambda: 5.0), dialled  # type: ignore[arg-type]


def test_plan_waits_until_every_pair_was_tried_and_gets_the_slower_direction(monkeypatch):
    fleet = FakeFleet(*(device(name) for name in "abcd"))
    known, dialled = mapped(monkeypatch, fleet, closed=set())

    asyncio.run(known.known_among([one.agent_id for one in fleet.devices]))

    table = known.table(fleet.devices)
    assert len(table.measured) == len(dialled) == 6
    assert {entry.link.bandwidth_bytes_per_s for entry in table.measured} == {1e8}
    assert {entry.age_s for entry in table.measured} == {0.0}
    assert len(known.table(fleet.devices[:2]).measured) == 1


def test_pair_with_one_closed_direction_is_measured_the_other_way_and_a_closed_pair_is_told(monkeypatch):
    fleet = FakeFleet(*(device(name) for name in "abc"))
    known, _ = mapped(monkeypatch, fleet, closed={("a", "b"), ("b", "c"), ("c", "b")})

    asyncio.run(known.known_among([one.agent_id for one in fleet.devices]))

    rows = {tuple(row["agent_ids"]): row for row in known.rows()}
    assert rows["a", "b"]["error"] == ""
    assert rows["a", "b"]["between"] == ["the a", "the b"]
    assert "b found c closed; c found b closed" in rows["b", "c"]["error"]
    assert rows["b", "c"]["bandwidth_bytes_per_s"] is None
    # What was not measured is left to assumptions, and said so.
    profiles = [profile(one) for one in fleet.devices]
    table = known.table(fleet.devices)
    assert table.how_known(profiles[0], profiles[1]) == "measured 0 s ago"
    assert table.how_known(profiles[1], profiles[2]) == "assumed"


def test_plan_does_not_wait_for_devices_that_work_for_another_job(monkeypatch):
    fleet = FakeFleet(device("a"), device("b"))
    fleet.links[AgentId("a")].workers.add(WorkerRef("job", 1, 0, 0))  # type: ignore[arg-type]
    known, dialled = mapped(monkeypatch, fleet, closed=set())

    asyncio.run(known.known_among([AgentId("a"), AgentId("b")]))

    assert dialled == []
    assert known.table(fleet.devices).measured == ()


def profile(one: Device) -> DeviceProfile:
    timings = BlockTimings(forward_s=1, backward_s=1, embedding_s=1, head_forward_s=1, head_backward_s=1)
    return DeviceProfile(
        agent_id=one.agent_id,
        name=one.name,
        host_id=one.host_id,
        threads=1,
        available_bytes=2,
        baseline_bytes=1,
        timings=timings,
    )


def test_rate_leaves_the_ramp_out():
    # 10 bytes a second for two seconds, then 100: the beginning is TCP's.
    arrivals = [(0.0, 0), (1.0, 10), (2.0, 20), (3.0, 120), (4.0, 220), (5.0, 320), (6.0, 420)]

    assert rate_of(arrivals) == pytest.approx(100.0)
    assert rate_of([(0.0, 0), (2.0, 10)]) == pytest.approx(5.0)
