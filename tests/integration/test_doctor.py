"""Doctors of a device and of a coordinator, over real gRPC and real agents; only the heavy probes are stood in for."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from coordinator.cli import main as plutino
from coordinator.doctor import DoctorOptions, examine_coordinator
from edge_node import cli as node_cli
from edge_node.agent import Agent, AgentConfig
from edge_node.doctor import NodeDoctorOptions, examine_node
from edge_node.pool_config import PoolConfig
from edge_node.state_dir import StateDir
from plutino.doctor.child import ChildRun
from plutino.doctor.door import Door, knock
from plutino.doctor.report import Finding, Verdict, fail, ok
from plutino.doctor.wire import dial_back, greet
from plutino.errors import SecurityError, UnreachableError
from plutino.wire.channel import Lane, sync_channel
from protos import doctor_pb2, doctor_pb2_grpc
from tests.integration.stack import WAIT_S, People, ThreadCoordinator, wait_until
from tests.unit.doctor.test_judgements import kernel_results

FAKE_WORKER = (sys.executable, str(Path(__file__).with_name("fake_worker.py")))
KERNELS = ChildRun(results=kernel_results())


class RealAgent:
    """The agent itself, on an event loop in a thread, with workers that have no torch."""

    def __init__(self, address: str, name: str, folder: Path) -> None:
        pool = PoolConfig(memory_budget_bytes=1 << 30, threads=1, worker_command=FAKE_WORKER)
        config = AgentConfig(coordinator_address=address, name=name, pool=pool)
        self._made = threading.Event()

        async def run() -> None:
            self._agent = Agent(config, StateDir(folder))
            self._loop = asyncio.get_running_loop()
            self._made.set()
            await self._agent.run()

        self._thread = threading.Thread(target=lambda: asyncio.run(run()), name=name)
        self._thread.start()
        assert self._made.wait(WAIT_S)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._agent.end)
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()


@pytest.fixture(scope="module")
def state_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def coordinator(state_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ThreadCoordinator]:
    """A coordinator with two devices."""
    with ExitStack() as stack:
        coordinator = ThreadCoordinator(state_dir)
        stack.callback(coordinator.close)
        for name in ("desk", "pi"):
            agent = RealAgent(coordinator.endpoints.devices_address, name, tmp_path_factory.mktemp(name))
            stack.callback(agent.close)
        people = People(coordinator.endpoints.people_address)
        stack.callback(people.close)
        wait_until(lambda: len(people.devices()) == 2, "two devices")
        yield coordinator


def named(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_device_doctor_finds_both_ways_the_clock_and_the_other_side(coordinator, tmp_path):
    options = NodeDoctorOptions(
        state_dir=tmp_path, threads=1, coordinator_address=coordinator.endpoints.devices_address
    )

    found = named(examine_node(options, run_kernels=lambda threads: KERNELS))

    for name in ("control port", "bulk port", "clock", "versions of the coordinator", "fp32 kernels", "memory"):
        assert found[name].verdict is Verdict.OK, found[name]
    # Reached by both devices, which are on this very host: said, because it proves nothing about a network.
    assert found["data plane"].verdict is Verdict.WARN
    assert "desk in " in found["data plane"].measured
    assert "pi in " in found["data plane"].measured
    # The fake workers run torch 0.
    assert "here, 0 there" in found["versions of the other devices"].measured


def test_device_doctor_without_its_coordinator_fails_there_and_goes_no_further(tmp_path):
    options = NodeDoctorOptions(state_dir=tmp_path, threads=1, coordinator_address="127.0.0.1:9")

    found = named(examine_node(options, run_kernels=lambda threads: KERNELS))

    assert found["control port"].verdict is Verdict.FAIL
    assert "plutino up" in found["control port"].fix
    assert "clock" not in found


def test_coordinator_doctor_lets_every_device_dial_every_other(coordinator, state_dir):
    options = DoctorOptions(state_dir=state_dir, has_ray=False)

    found = named(examine_coordinator(options, run_kernels=lambda threads: KERNELS))

    assert found["data plane"].verdict is Verdict.OK, found["data plane"]
    assert "all 2 directions" in found["data plane"].measured
    assert found["coordinator"].measured.startswith("runs; 2 devices are in: ")
    assert found["SQLite"].verdict is Verdict.OK
    assert "fsync" in found["state folder"].measured


def test_coordinator_doctor_without_a_coordinator_examines_the_machine_alone(tmp_path):
    options = DoctorOptions(state_dir=tmp_path / "none", has_ray=False)

    found = named(examine_coordinator(options, run_kernels=lambda threads: KERNELS))

    assert found["coordinator"].verdict is Verdict.WARN
    assert found["coordinator"].fix == "plutino up"
    assert not (tmp_path / "none").exists()


def test_devices_are_not_lent_out_to_dial_somebody_else(coordinator):
    with sync_channel(coordinator.endpoints.devices_address, Lane.CONTROL) as channel:
        stub = doctor_pb2_grpc.DoctorServiceStub(channel)
        request = doctor_pb2.DialBackRequest(address="10.1.2.3:22")
        with pytest.raises(Exception, match="is not where the call comes from"):
            stub.DialBack(request, timeout=WAIT_S)


def test_closed_door_is_told_by_who_knocked(coordinator):
    with Door() as door:
        address = door.address
    dials = None
    with sync_channel(coordinator.endpoints.devices_address, Lane.CONTROL) as channel:
        stub = doctor_pb2_grpc.DoctorServiceStub(channel)
        dials = stub.DialBack(doctor_pb2.DialBackRequest(address=address), timeout=WAIT_S).dials

    assert {dial.from_device for dial in dials} == {"desk", "pi"}
    assert all("did not answer" in dial.error for dial in dials)


def test_door_answers_a_knock_until_it_is_closed_and_listens_on_loopback_only():
    with Door() as door:
        assert knock(door.address) > 0
    with pytest.raises(UnreachableError, match="did not answer"):
        knock(door.address)
    with pytest.raises(SecurityError):
        Door("0.0.0.0")


def test_devices_measure_the_way_between_them_and_it_is_told_with_its_age_and_host(coordinator):
    people = People(coordinator.endpoints.people_address)
    try:
        wait_until(lambda: all(device["measured_links"] for device in people.devices()), "both ends know the link")
        devices = people.devices()
    finally:
        people.close()

    (row,) = devices[0]["measured_links"]
    assert devices[1]["measured_links"][0]["agent_ids"] == row["agent_ids"]
    assert set(row["between"]) == {"desk", "pi"}
    assert row["error"] == ""
    assert row["is_same_host"]
    assert row["bandwidth_bytes_per_s"] > 0
    assert row["latency_s"] > 0
    assert row["age_s"] >= 0


def test_greeting_measures_no_skew_against_this_very_clock(coordinator):
    greeting = greet(coordinator.endpoints.devices_address)

    assert abs(greeting.skew_s) <= greeting.round_trip_s
    assert set(greeting.devices) == {"desk", "pi"}
    assert dial_back(coordinator.endpoints.devices_address, host_id="elsewhere")[0].error == ""


def test_command_lines_print_one_json_document_and_exit_by_its_verdict(capsys, monkeypatch):
    findings = [ok("memory", "8 GiB"), fail("bulk port", "no answer", "open 7422/tcp")]
    monkeypatch.setattr("edge_node.doctor.examine_node", lambda options: findings)
    monkeypatch.setattr("coordinator.doctor.examine_coordinator", lambda options: findings[:1])

    code = node_cli.main(["doctor", "--json", "--threads", "1"])
    device = json.loads(capsys.readouterr().out)
    with pytest.raises(SystemExit) as ended:
        plutino(["doctor", "--engine", "local", "--json"])
    coordinator = json.loads(capsys.readouterr().out)

    assert (code, device["exit_code"], [one["verdict"] for one in device["findings"]]) == (1, 1, ["ok", "fail"])
    assert (ended.value.code, coordinator["exit_code"]) == (0, 0)


@pytest.mark.slow
@pytest.mark.parametrize("command", [("doctor", "--state-dir", "STATE"), ("node", "doctor", "--threads", "1")])
def test_real_doctors_find_this_machine_fit(tmp_path, command):
    words = [word.replace("STATE", str(tmp_path / "state")) for word in command]
    ended = subprocess.run(
        [sys.executable, "-m", "coordinator.cli", *words, "--json"], capture_output=True, text=True, timeout=300
    )

    found = {finding["name"]: finding for finding in json.loads(ended.stdout)["findings"]}
    assert {name for name, finding in found.items() if finding["verdict"] == "fail"} == set(), found
    assert ended.returncode == 0
    assert found["training step"]["verdict"] == found["fp32 kernels"]["verdict"] == "ok"
    if words[0] == "doctor":
        assert "starts in" in found["Ray"]["measured"]
