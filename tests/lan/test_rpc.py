"""What loopback cannot prove: an RPC over mutual TLS from one host to another, under the address it has there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from plutino.security.certificates import Authority
from plutino.security.identity import PeerName, Role
from tests.lan.network import Lan

REPOSITORY_DIR = Path(__file__).resolve().parents[2]
RPC = (sys.executable, "-m", "tests.lan.rpc")
WAIT_S = 30.0


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=REPOSITORY_DIR, capture_output=True, text=True, timeout=WAIT_S)


@contextmanager
def open_door(lan: Lan, host: int, identity: Path) -> Iterator[str]:
    """A listener on a host; its address."""
    command = lan.command(host, [*RPC, "door", str(identity), lan.address(host)])
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=REPOSITORY_DIR, stdin=pipe, stdout=pipe, text=True) as door:
        try:
            assert door.stdout is not None
            yield door.stdout.readline().strip()
        finally:
            door.communicate(timeout=WAIT_S)


def test_rpc_over_tls_reaches_another_host_and_only_the_device_that_is_meant(lan, tmp_path):
    authority = Authority.open(tmp_path / "authority.pem")
    for name in ("desk", "pi"):
        authority.identity(PeerName(name, Role.NODE)).write(tmp_path / name)
    network = lan(2, rate_mbit=100)

    with open_door(network, 0, tmp_path / "desk") as address:
        knock = [*RPC, "knock", str(tmp_path / "pi"), address]
        reached = run(network.command(1, [*knock, "desk"]))
        mistaken = run(network.command(1, [*knock, "pi"]))

    assert address.startswith(f"{network.address(0)}:")
    assert reached.returncode == 0, reached.stderr
    assert float(reached.stdout) > 0
    assert "UnreachableError" in mistaken.stderr, os.linesep.join([mistaken.stdout, mistaken.stderr])


# A cable of 12.5 MB/s: what shapes it lets a first burst pass unshaped.
MOST_BYTES_PER_S = 16e6
LEAST_BYTES_PER_S = 6e6
DIRECTIONS = ("up_bytes_per_s", "down_bytes_per_s")


def bursts(lan, tmp_path, num_dials):
    """What so many dials over a cable of 100 Mbit/s measured."""
    authority = Authority.open(tmp_path / "authority.pem")
    for name in ("desk", "pi"):
        authority.identity(PeerName(name, Role.NODE)).write(tmp_path / name)
    network = lan(2, rate_mbit=100)
    figures = []
    with open_door(network, 0, tmp_path / "desk") as address:
        for _ in range(num_dials):
            measured = run(network.command(1, [*RPC, "measure", str(tmp_path / "pi"), address, "desk"]))
            assert measured.returncode == 0, measured.stderr
            figures.append(json.loads(measured.stdout))
    return figures


def test_burst_tells_both_directions_and_never_more_than_the_cable_carries(lan, tmp_path):
    (figures,) = bursts(lan, tmp_path, 1)

    for direction in DIRECTIONS:
        assert 0 < figures[direction] < MOST_BYTES_PER_S, figures


@pytest.mark.slow
def test_best_of_ten_bursts_finds_the_rate_of_the_cable_in_both_directions(lan, tmp_path):
    # Both hosts share this machine's cores, so a burst may be slower than the cable, and none is faster.
    figures = bursts(lan, tmp_path, 10)

    for direction in DIRECTIONS:
        assert LEAST_BYTES_PER_S < max(each[direction] for each in figures) < MOST_BYTES_PER_S, figures
