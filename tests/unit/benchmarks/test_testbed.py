from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

import pytest

from benchmarks.agent_processors import agent_processes
from benchmarks.relay import Host, RelayPlan
from benchmarks.relay_carrier import Way
from benchmarks.tcp_sockets import CONNECTED, LISTENING, TcpSockets, listing_refusal
from benchmarks.testbed import relay_plan
from partitioner.fleet_file import FleetFile
from plutino.errors import ConfigError
from plutino.sizes import GIB

WAIT_S = 20.0


def fleet(*devices: dict, **links) -> FleetFile:
    return FleetFile.model_validate({"devices": devices, **links})


UNEQUAL = fleet(
    {"name": "desktop", "memory": "4GiB", "flops": 4e11, "threads": 4},
    {"name": "board", "memory": "1GiB", "flops": 1e11, "threads": 4, "count": 2},
)


def test_slower_devices_get_their_share_of_processor_time():
    agents, notes = agent_processes(UNEQUAL, has_quotas=True)

    assert [(a.name, a.budget_bytes, a.threads, a.quota_cores) for a in agents] == [
        ("desktop", 4 * GIB, 4, None),
        ("board-1", GIB, 1, 1.0),
        ("board-2", GIB, 1, 1.0),
    ]
    assert notes == []


def test_slower_devices_get_fewer_processors_where_no_quota_can_be_set_and_what_is_lost_is_said():
    odd = fleet({"name": "fast", "memory": "1GiB", "flops": 2e11, "threads": 2}, UNEQUAL.devices[1].model_dump())

    agents, notes = agent_processes(UNEQUAL, has_quotas=False)
    _, odd_notes = agent_processes(fleet(*(d.model_dump() for d in (*odd.devices, slow("2e10")))), has_quotas=False)

    assert [agent.threads for agent in agents] == [4, 1, 1]
    assert notes == []
    assert odd_notes == ["slow has 1 processors in place of 0.2: no quota can be set"]


def test_devices_that_share_processors_differ_in_their_quotas_alone():
    agents, notes = agent_processes(UNEQUAL, has_quotas=True, quota=0.2)

    assert [(a.name, a.threads, a.quota_cores) for a in agents] == [
        ("desktop", 1, 0.8),
        ("board-1", 1, 0.2),
        ("board-2", 1, 0.2),
    ]
    assert notes == []
    with pytest.raises(ConfigError, match="root"):
        agent_processes(UNEQUAL, has_quotas=False, quota=0.2)
    with pytest.raises(ConfigError, match=r"0\.5 of a processor for each of 4 threads.*at most 0\.25"):
        agent_processes(UNEQUAL, has_quotas=True, quota=0.5)


def slow(flops: str):
    return fleet({"name": "slow", "memory": "1GiB", "flops": float(flops), "threads": 4}).devices[0]


def test_named_links_differ_from_the_others_both_ways(tmp_path):
    links = [{"between": ["desktop", "board-2"], "rate": "100Mbit", "latency_ms": 4}]
    plan = relay_plan(UNEQUAL.model_validate({**UNEQUAL.model_dump(), "links": links}), tmp_path, 7)

    slow_way = Way(bytes_per_s=12.5e6, latency_s=0.004)
    assert plan.ways == {"desktop -> board-2": slow_way, "board-2 -> desktop": slow_way}
    assert plan.other == Way(bytes_per_s=125e6, latency_s=0.0005)
    assert len({host.listens for host in plan.hosts} | {host.advertises for host in plan.hosts}) == 6
    assert RelayPlan.from_json(plan.to_json()) == plan
    beside = relay_plan(UNEQUAL, tmp_path, 254)
    assert {host.listens for host in plan.hosts}.isdisjoint(host.listens for host in beside.hosts)


ECHO = "import socket, sys; s = socket.create_server((sys.argv[1], 0)); print(s.getsockname()[1], flush=True)\n"
ECHO += "c, _ = s.accept()\nwhile d := c.recv(65536): c.sendall(d)"
DIAL = "import socket, sys; c = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=20)\n"
DIAL += "c.sendall(sys.argv[3].encode()); c.shutdown(socket.SHUT_WR)\n"
DIAL += "while d := c.recv(65536): print(d.decode(), end='')"


lists_sockets = pytest.mark.skipif(listing_refusal() is not None, reason=f"{listing_refusal()}")


@lists_sockets
def test_what_is_sent_through_the_relay_arrives_and_comes_back(tmp_path):
    plan = RelayPlan(
        hosts=(Host(name="echo", listens="127.0.77.1", advertises="127.0.78.1", mark="echo mark"),),
        other=Way(bytes_per_s=1e6, latency_s=0.001),
    )
    (tmp_path / "plan.json").write_text(plan.to_json())
    started = []
    try:
        relay = subprocess.Popen([sys.executable, "-m", "benchmarks.relay", str(tmp_path / "plan.json")])
        started.append(relay)
        echo = subprocess.Popen([sys.executable, "-c", ECHO, "127.0.77.1"], stdout=subprocess.PIPE, text=True)
        started.append(echo)
        assert echo.stdout is not None
        port = int(echo.stdout.readline())
        deadline_s = time.monotonic() + WAIT_S
        while not is_listened_on("127.0.78.1", port):
            assert relay.poll() is None and time.monotonic() < deadline_s
        dial = [sys.executable, "-c", DIAL, "127.0.78.1", str(port), "hello " * 1000]
        answer = subprocess.run(dial, capture_output=True, text=True, timeout=WAIT_S)
    finally:
        for process in started:
            process.kill()
            process.wait(WAIT_S)
            if process.stdout is not None:
                process.stdout.close()

    assert answer.stdout == "hello " * 1000, answer.stderr


def is_listened_on(host: str, port: int) -> bool:
    with TcpSockets() as sockets:
        return any((one.host, one.port) == (host, port) for one in sockets.of_state(LISTENING))


@lists_sockets
def test_the_kernel_tells_who_listens_and_who_is_connected():
    with socket.create_server(("127.0.79.1", 0)) as server, TcpSockets() as sockets:
        host, port = server.getsockname()
        assert is_listened_on(host, port)
        with socket.create_connection((host, port)) as connection:
            own = os.stat(connection.fileno()).st_ino
            assert own in {one.inode for one in sockets.of_state(CONNECTED)}
    assert not is_listened_on(host, port)
