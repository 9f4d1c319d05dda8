from __future__ import annotations

from coordinator.fleet.cores import shared_cores
from coordinator.fleet.membership import Device
from plutino.hardware import Hardware
from plutino.types import AgentId


def device(name: str, host: str = "h", cores: str = "0123", kind: str = "cpu", quota: float | None = None) -> Device:
    return Device(
        agent_id=AgentId(name),
        name=name,
        host_id=host,
        memory_budget_bytes=1,
        baseline_bytes=0,
        threads=1,
        hardware=Hardware(kind=kind),
        processors=tuple(cores),
        processor_quota=quota,
    )


def shared(*devices: Device, threads: int = 2) -> list[str]:
    found = shared_cores(devices, {one.agent_id: threads for one in devices})
    return [found[one.agent_id] for one in devices]


def test_cores_are_shared_by_devices_whose_threads_are_more_than_their_cores() -> None:
    assert shared(device("a"), device("b"), threads=3) == ["h a", "h a"]


def test_cores_suffice_for_devices_whose_threads_fit_them() -> None:
    assert shared(device("a"), device("b")) == ["", ""]


def test_cores_suffice_for_devices_whose_quotas_fit_them() -> None:
    assert shared(*(device(name, cores="01", quota=0.5) for name in "abcd"), threads=1) == [""] * 4
    assert shared(*(device(name, cores="01", quota=0.5) for name in "abcde"), threads=1) == ["h a"] * 5
    assert shared(device("a", cores="01", quota=9.0), device("b", cores="01"), threads=1) == ["", ""]


def test_cores_of_devices_pinned_apart_are_their_own() -> None:
    assert shared(device("a", cores="01"), device("b", cores="23"), threads=2) == ["", ""]


def test_cores_of_other_hosts_are_other_cores() -> None:
    assert shared(device("a", host="g"), device("b", host="h"), threads=4) == ["", ""]


def test_cores_that_are_not_known_count_as_all_of_the_host() -> None:
    assert shared(device("a", cores=""), device("b", cores="01"), device("c", cores="23")) == ["h a"] * 3


def test_cores_shared_through_a_third_device_are_one_group() -> None:
    assert shared(device("a", cores="01"), device("c", cores="12"), device("b", cores="23")) == ["h a"] * 3


def test_card_of_two_devices_is_shared_whatever_their_threads() -> None:
    assert shared(*(device(name, cores="x", kind="cuda") for name in "ab"), threads=0) == ["h a", "h a"]
    assert shared(device("a", cores="x", kind="cuda"), device("b", cores="y", kind="cuda")) == ["", ""]
