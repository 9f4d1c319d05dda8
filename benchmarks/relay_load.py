"""All links of an emulated fleet under load at once, over plain TCP: is the emulator quicker than what it emulates?

``python -m benchmarks.relay_load [--hosts 4] [--rate 1Gbit] [--latency-ms 0.5] [--seconds 4]``: every host sends to
every other one through :mod:`benchmarks.relay`; prints each way's rate beside the asked one, the round trip of a byte
before the load, and the processor seconds of the relay's processes for a GB. ``--ways ring`` loads neighbours alone,
``--connections 2`` shares every way among as many connections.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import psutil

from benchmarks.measure import write_results
from benchmarks.relay import Host, RelayPlan
from benchmarks.relay_carrier import Way
from partitioner.fleet_file import FleetFile

_PIECE_BYTES = 1 << 20
_WAIT_S = 30.0
_SETTLE_S = 1.0
"""Buffers of both ends fill at the speed of loopback."""
_NUM_PINGS = 20
_NAME_BYTES = 16


def main() -> None:
    """Load the links and print what they gave."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=4)
    parser.add_argument("--rate", default="1Gbit")
    parser.add_argument("--latency-ms", type=float, default=0.5)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--connections", type=int, default=1, help="of each way")
    parser.add_argument("--ways", choices=["all", "ring"], default="all")
    parser.add_argument("--out", type=Path, help="a file for the figures")
    parser.add_argument("--as-host", metavar="JSON", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.as_host is not None:
        return _be_host(json.loads(options.as_host))
    figures = load(options)
    _show(figures)
    if options.out is not None:
        write_results(options.out, figures)


def load(options: argparse.Namespace) -> dict[str, object]:
    """Run hosts and a relay, and return the figures."""
    device = {"name": "host", "memory": "1GiB", "threads": 1, "flops": 1e10, "count": max(2, options.hosts)}
    fleet = FleetFile.model_validate({"devices": [device], "rate": options.rate, "latency_ms": options.latency_ms})
    other = fleet.link_table().other
    net = f"127.200.{1 + os.getpid() % 254}"
    hosts = [
        Host(name=f"host{i}", listens=f"{net}.{i + 1}", advertises=f"{net}.{i + 101}", mark=f"mark-of-{net}.{i}")
        for i in range(options.hosts)
    ]
    plan = RelayPlan(hosts=tuple(hosts), other=Way(bytes_per_s=other.bandwidth_bytes_per_s, latency_s=other.latency_s))
    with tempfile.TemporaryDirectory(prefix="plutino-relay-") as work, contextlib.ExitStack() as ending:
        path = Path(work) / "relay.json"
        path.write_text(plan.to_json(), encoding="utf-8")
        relay = _start(ending, "-m", "benchmarks.relay", str(path))
        processes = []
        for i, host in enumerate(hosts):
            peers = [(i + 1) % len(hosts), (i - 1) % len(hosts)] if options.ways == "ring" else range(len(hosts))
            told = {
                "name": host.name,
                "listens": host.listens,
                "peers": {hosts[j].name: hosts[j].advertises for j in sorted(set(peers) - {i})},
                "seconds": options.seconds,
                "connections": options.connections,
            }
            # The mark is how the relay knows the process.
            told_text = json.dumps(told)
            processes.append(_start(ending, "-m", "benchmarks.relay_load", "--as-host", told_text, "--out", host.mark))
        ports = {host.name: _answer(process)["port"] for host, process in zip(hosts, processes, strict=True)}
        _tell(processes, ports)
        pings = {name: s for process in processes for name, s in _answer(process)["pings"].items()}
        _tell(processes, {})
        before_s, began_s = _processor_s(relay), time.monotonic()
        rows = {name: row for process in processes for name, row in _answer(process)["ways"].items()}
        took_s = time.monotonic() - began_s
        relay_s = _processor_s(relay) - before_s
    carried = sum(row["num_bytes"] for row in rows.values())
    return {
        "asked_mbit": 8e-6 * plan.other.bytes_per_s,
        "asked_round_trip_ms": 2e3 * plan.other.latency_s,
        "ways_mbit": {name: row["mbit"] for name, row in sorted(rows.items())},
        "round_trips_ms": {name: 1e3 * s for name, s in sorted(pings.items())},
        "sum_mb_per_s": sum(row["mbit"] for row in rows.values()) / 8,
        "relay_processor_s_per_gb": relay_s / carried * 1e9,
        "relay_processors_busy": relay_s / took_s,
        "cores": len(os.sched_getaffinity(0)),
    }


def _show(figures: dict[str, object]) -> None:
    rates = figures["ways_mbit"]
    assert isinstance(rates, dict)
    for name, mbit in rates.items():
        print(f"{name}: {mbit:.1f} of {figures['asked_mbit']:.1f} Mbit/s")
    trips = figures["round_trips_ms"]
    assert isinstance(trips, dict)
    print(f"round trips: median {statistics.median(trips.values()):.2f} ms, asked {figures['asked_round_trip_ms']:.2f}")
    print(f"together {figures['sum_mb_per_s']:.0f} MB/s on {figures['cores']} cores")
    per_gb, busy = figures["relay_processor_s_per_gb"], figures["relay_processors_busy"]
    print(f"the relay took {per_gb:.2f} processor seconds a GB and kept {busy:.2f} processors busy")


def _start(ending: contextlib.ExitStack, *arguments: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )

    def end() -> None:
        process.terminate()
        with process:  # closes its pipes and reaps it
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_WAIT_S)
            process.kill()

    ending.callback(end)
    return process


def _answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    if not (line := process.stdout.readline()):
        raise SystemExit(f"a host ended with exit code {process.wait(_WAIT_S)}")
    answer: dict[str, Any] = json.loads(line)
    return answer


def _tell(processes: list[subprocess.Popen[str]], what: object) -> None:
    for process in processes:
        assert process.stdin is not None
        print(json.dumps(what), file=process.stdin, flush=True)


def _processor_s(relay: subprocess.Popen[str]) -> float:
    parent = psutil.Process(relay.pid)
    times = [process.cpu_times() for process in (parent, *parent.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def _be_host(told: dict[str, object]) -> None:
    """Answer pings and count what comes; ping peers, then load the ways to them."""
    peers, seconds, own = told["peers"], told["seconds"], str(told["name"])
    assert isinstance(peers, dict) and isinstance(seconds, float)
    counts: dict[str, int] = defaultdict(int)
    server = socket.create_server((str(told["listens"]), 0), backlog=64)
    threading.Thread(target=_receive_all, args=(server, counts), daemon=True).start()
    print(json.dumps({"port": server.getsockname()[1]}), flush=True)
    ports = json.loads(sys.stdin.readline())
    ends = {
        peer: [_dial(host, ports[peer], own) for _ in range(int(str(told["connections"])))]
        for peer, host in peers.items()
    }
    pings = {f"{own} -> {peer}": _ping(of_peer[0]) for peer, of_peer in ends.items()}
    print(json.dumps({"pings": pings}), flush=True)
    sys.stdin.readline()
    for end in (end for of_peer in ends.values() for end in of_peer):
        threading.Thread(target=_send_on, args=(end,), daemon=True).start()
    time.sleep(_SETTLE_S)
    before, began_s = dict(counts), time.monotonic()
    time.sleep(seconds)
    after, took_s = dict(counts), time.monotonic() - began_s
    rows = {
        f"{peer} -> {own}": {"num_bytes": after[peer], "mbit": (after[peer] - before.get(peer, 0)) / took_s * 8e-6}
        for peer in after
    }
    print(json.dumps({"ways": rows}), flush=True)
    sys.stdin.readline()  # until the others have counted as well


def _dial(host: str, port: int, own: str) -> socket.socket:
    deadline_s = time.monotonic() + _WAIT_S
    while True:
        try:
            end = socket.create_connection((host, port), timeout=_WAIT_S)
        except ConnectionRefusedError:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.01)  # the relay has not seen the port yet
            continue
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        end.sendall(own.encode().ljust(_NAME_BYTES))
        return end


def _ping(end: socket.socket) -> float:
    times = []
    for _ in range(_NUM_PINGS):
        began_s = time.monotonic()
        end.sendall(b"?")
        end.recv(1)
        times.append(time.monotonic() - began_s)
    return statistics.median(times)


def _send_on(end: socket.socket) -> None:
    end.settimeout(None)
    piece = bytes(_PIECE_BYTES)
    with contextlib.suppress(OSError):  # the other host has ended
        while True:
            end.sendall(piece)


def _receive_all(server: socket.socket, counts: dict[str, int]) -> None:
    while True:
        end, _ = server.accept()
        threading.Thread(target=_receive, args=(end, counts), daemon=True).start()


def _receive(end: socket.socket, counts: dict[str, int]) -> None:
    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    buffer = bytearray(_PIECE_BYTES)
    peer = end.recv(_NAME_BYTES, socket.MSG_WAITALL).decode().strip()
    with contextlib.suppress(OSError):  # the other host has ended
        while count := end.recv_into(buffer):
            if buffer[0]:
                end.sendall(b"!")
            else:
                counts[peer] += count


if __name__ == "__main__":
    main()
