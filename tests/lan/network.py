"""A LAN on one machine: hosts are network namespaces, joined by a bridge in a namespace of its own.

Nothing outside these namespaces changes, and the kernel forgets them when they are deleted. Rates are those of a token
bucket (tbf) on both ends of every cable, so a host sends and receives at most so much. Needs root, iproute2 and a
kernel with veth, bridge and tbf; :func:`missing` says what is not there.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Sequence
from types import TracebackType

_COMMAND_S = 20.0
BURST_BYTES = 256 * 1024
"""What a cable carries at once after a pause; with high-resolution timers enough for 1 Gbit/s."""


def missing() -> str | None:
    """Why there can be no LAN here; None if there can."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    if os.geteuid() != 0:
        return "network namespaces need root"
    for program in ("ip", "tc"):
        if shutil.which(program) is None:
            return f"{program} is not installed (iproute2)"
    try:
        with Lan(1, rate_mbit=100):
            return None
    except subprocess.CalledProcessError as error:
        return f"the kernel refuses: {' '.join(error.cmd)}: {error.stderr.strip()}"


class Lan:
    """Hosts 0 to n - 1 with addresses 10.77.0.1 to 10.77.0.n; leaving the ``with`` block unplugs them.

    Args:
        num_hosts: how many.
        rate_mbit: what every host sends and receives at most, in Mbit/s.
    """

    def __init__(self, num_hosts: int, *, rate_mbit: float) -> None:
        self._name = f"plutino-{secrets.token_hex(3)}"
        self._num_hosts = num_hosts
        self._rate_mbit = rate_mbit
        self._namespaces: list[str] = []

    def __enter__(self) -> Lan:
        try:
            self._build()
        except BaseException:
            self._tear_down()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tear_down()

    def address(self, host: int) -> str:
        """The host's address."""
        return f"10.77.0.{host + 1}"

    def command(self, host: int, command: Sequence[str], *, as_nobody: bool = False) -> list[str]:
        """The same command, run on a host; as an ordinary user if asked, who owns nothing."""
        user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--no-new-privs"] if as_nobody else []
        return ["ip", "netns", "exec", self._host(host), *user, *command]

    def set_rate(self, rate_mbit: float) -> None:
        """Replace all cables' rates, under whatever is on them."""
        for host in range(self._num_hosts):
            self._set_rate(host, rate_mbit)

    def sent_bytes(self, host: int) -> int:
        """Bytes that a host has sent so far, headers included."""
        text = self._ip("netns", "exec", self._host(host), "cat", "/sys/class/net/eth0/statistics/tx_bytes")
        return int(text)

    def _host(self, host: int) -> str:
        return f"{self._name}-{host}"

    def _build(self) -> None:
        switch = self._add_namespace(f"{self._name}-switch")
        self._ip("-n", switch, "link", "add", "br0", "type", "bridge")
        self._ip("-n", switch, "link", "set", "br0", "up")
        for host in range(self._num_hosts):
            name = self._add_namespace(self._host(host))
            self._ip("-n", switch, "link", "add", f"port{host}", "type", "veth", "peer", "name", "eth0", "netns", name)
            self._ip("-n", switch, "link", "set", f"port{host}", "master", "br0", "up")
            self._ip("-n", name, "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
            self._ip("-n", name, "link", "set", "lo", "up")
            self._ip("-n", name, "link", "set", "eth0", "up")
            self._set_rate(host, self._rate_mbit)

    def _set_rate(self, host: int, rate_mbit: float) -> None:
        bucket = ("rate", f"{rate_mbit:g}mbit", "burst", str(BURST_BYTES), "latency", "50ms")
        for name, device in ((self._host(host), "eth0"), (f"{self._name}-switch", f"port{host}")):
            self._ip("netns", "exec", name, "tc", "qdisc", "replace", "dev", device, "root", "tbf", *bucket)

    def _add_namespace(self, name: str) -> str:
        self._ip("netns", "add", name)
        self._namespaces.append(name)
        return name

    def _tear_down(self) -> None:
        while self._namespaces:
            self._ip("netns", "del", self._namespaces.pop())

    def _ip(self, *arguments: str) -> str:
        ended = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=_COMMAND_S, check=True)
        return ended.stdout
