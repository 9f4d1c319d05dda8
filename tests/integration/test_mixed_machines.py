"""Unlike machines in one fleet: who is in a plan, who is left out of it, and who is not let in at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from plutino.hardware import WIRE_VERSION, Hardware
from plutino.wire.channel import Lane, sync_channel
from protos import agents_pb2, agents_pb2_grpc
from tests.e2e.stack import tiny_model
from tests.integration.stack import HARDWARE, WAIT_S, People, ThreadAgent, ThreadCoordinator, make_spec, wait_until

CARD = Hardware(kind="cuda", name="NVIDIA H200", machine="x86_64", capability="9.0", arithmetic="cuda H200 sm_90")
BOARD = Hardware(name="Raspberry Pi 5", machine="aarch64", arithmetic="cpu aarch64 0xd0b")
ROWS = "\n".join(f'{{"prompt": "say {n}", "completion": "{n}"}}' for n in range(4))


@pytest.fixture
def cleanup() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def coordinator(cleanup: ExitStack, tmp_path: Path) -> ThreadCoordinator:
    coordinator = ThreadCoordinator(tmp_path / "state")
    cleanup.callback(coordinator.close)
    return coordinator


def finished_job(cleanup: ExitStack, coordinator: ThreadCoordinator, tmp_path: Path, *agents: ThreadAgent) -> dict:
    people = People(coordinator.endpoints.people_address)
    cleanup.callback(people.close)
    for agent in agents:
        cleanup.callback(agent.close)
    wait_until(lambda: len(people.devices()) == len(agents), "the agents' hellos")
    (tmp_path / "rows.jsonl").write_text(ROWS + "\n")
    training = {"steps": 1, "batch_size": 2, "micro_batch_size": 2}
    spec = make_spec(
        tiny_model(tmp_path / "model"),
        tmp_path / "rows.jsonl",
        tmp_path / "adapter",
        training=training,
        placement={"stages": 2},
    )
    job_id = people.submit(spec)
    assert people.wait(job_id).state == "succeeded", people.job(job_id)
    return people.detail(job_id)


def test_x86_arm_and_cuda_work_in_one_plan_and_other_versions_are_left_out(cleanup, coordinator, tmp_path):
    address = coordinator.endpoints.devices_address
    agents = [
        ThreadAgent(address, "desk", hardware=CARD),
        ThreadAgent(address, "pi", hardware=BOARD),
        ThreadAgent(address, "old", memory_bytes=1 << 30, baseline_bytes=1 << 20, torch_version="2.6.0"),
    ]

    detail = finished_job(cleanup, coordinator, tmp_path, *agents)

    assert {name for stage in detail["plan"]["stages"] for name in stage["device_names"]} == {"desk", "pi"}
    assert detail["numerics"]["arithmetic"] is None
    (left_out,) = detail["plan"]["unused_devices"]
    assert left_out["what"] == "old"
    assert left_out["why"].startswith("has torch 2.6.0 instead of ")


def test_job_on_like_machines_fixes_what_they_round_by_and_devices_tells_their_hardware(cleanup, coordinator, tmp_path):
    address = coordinator.endpoints.devices_address
    detail = finished_job(cleanup, coordinator, tmp_path, ThreadAgent(address, "a"), ThreadAgent(address, "b"))

    assert detail["numerics"]["arithmetic"] == HARDWARE.arithmetic
    people = People(coordinator.endpoints.people_address)
    cleanup.callback(people.close)
    assert [device["hardware"]["name"] for device in people.devices()] == ["thread", "thread"]


def test_agent_of_another_protocol_is_refused_and_does_not_count_as_a_device(cleanup, coordinator):
    channel = sync_channel(coordinator.endpoints.devices_address, Lane.CONTROL)
    cleanup.callback(channel.close)
    hello = agents_pb2.AgentHello(agent_id="a-old", name="old", wire_version=WIRE_VERSION + 1)
    stub = agents_pb2_grpc.AgentServiceStub(channel)

    commands = list(stub.Attach(iter([agents_pb2.AgentEvent(hello=hello)]), timeout=WAIT_S))

    assert len(commands) == 1
    assert "upgrade the coordinator's plutino" in commands[0].welcome.refused
    people = People(coordinator.endpoints.people_address)
    cleanup.callback(people.close)
    assert people.devices() == []
