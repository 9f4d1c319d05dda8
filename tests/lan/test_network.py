"""The LAN for tests is a LAN: hosts reach each other and nobody else, no faster than their cables."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.lan.network import BURST_BYTES, Lan

TALK = (sys.executable, "-S", str(Path(__file__).with_name("talk.py")))
WAIT_S = 30.0


def seconds_for(lan: Lan, num_bytes: int, *, sender: int, receiver: int) -> float:
    """Time that bytes take from one host to another over one TCP connection."""
    listen = lan.command(receiver, [*TALK, "listen", lan.address(receiver)])
    with subprocess.Popen(listen, stdout=subprocess.PIPE, text=True) as listening:
        try:
            assert listening.stdout is not None
            address = f"{lan.address(receiver)}:{listening.stdout.readline().strip()}"
            send = lan.command(sender, [*TALK, "send", address, str(num_bytes)])
            ended = subprocess.run(send, capture_output=True, text=True, timeout=WAIT_S)
            assert ended.returncode == 0, ended.stderr
            listening.wait(WAIT_S)
        finally:
            listening.kill()
    return float(ended.stdout)


def test_hosts_reach_each_other_no_faster_than_their_cables(lan):
    network = lan(3, rate_mbit=20)
    num_bytes = 1 << 20

    before = network.sent_bytes(1)
    slow_s = seconds_for(network, num_bytes, sender=1, receiver=2)

    # A busy machine can only be slower. What the sender's bucket held at the start comes on top of the rate.
    assert slow_s >= 8 * (num_bytes - 2 * BURST_BYTES) / 20e6
    assert num_bytes < network.sent_bytes(1) - before < 1.2 * num_bytes


def test_host_has_no_way_out_of_the_lan(lan):
    network = lan(1, rate_mbit=100)
    code = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=5)"

    ended = subprocess.run(
        network.command(0, [sys.executable, "-S", "-c", code]), capture_output=True, text=True, timeout=WAIT_S
    )

    assert "Network is unreachable" in ended.stderr
