"""What loopback cannot prove: an RPC over mutual TLS from one host to another, under the address it has there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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


def test_bursts_find_the_rate_of_the_cable_in_both_directions(lan, tmp_path):
    authority = Authority.open(tmp_path / "authority.pem")
    for name in ("desk", "pi"):
        authority.identity(PeerName(name, Role.NODE)).write(tmp_path / name)
    network = lan(2, rate_mbit=100)

    with open_door(network, 0, tmp_path / "desk") as address:
        measured = run(network.command(1, [*RPC, "measure", str(tmp_path / "pi"), address, "desk"]))

    assert measured.returncode == 0, measured.stderr
    figures = json.loads(measured.stdout)
    # A cable of 12.5 MB/s: what shapes it lets a first burst pass unshaped, and both hosts share this machine's cores.
    for direction in ("up_bytes_per_s", "down_bytes_per_s"):
        assert 6e6 < figures[direction] < 16e6, figures
