"""Where a coordinator is reached: what it listens on is not always what others can dial."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence

import psutil

from plutino.errors import ConfigError
from plutino.wire.channel import is_loopback, split_address

WILDCARDS = frozenset({"0.0.0.0", "[::]"})
"""Listening there means on every address of this machine."""


def dialled_here(address: str) -> str:
    """The address as processes of this machine dial it."""
    host, port = split_address(address)
    return f"127.0.0.1:{port}" if host in WILDCARDS else address


def with_port_of(address: str, earlier: str | None) -> str:
    """The address; where it leaves the port open, with the port of the last start, so that members find it again."""
    host, port = split_address(address)
    if port != 0 or earlier is None:
        return address
    return f"{host}:{split_address(earlier)[1]}"


def beside(address: str, offset: int) -> str:
    """The address of another service of the same coordinator: so many ports further on, or any free one."""
    host, port = split_address(address)
    return f"{host}:{port + offset if port else 0}"


def advertised_hosts(listened_host: str, wanted: Sequence[str]) -> tuple[str, ...]:
    """The hosts that others dial, best first.

    Args:
        listened_host: what the coordinator listens on.
        wanted: what its owner says; empty to find out.

    Raises:
        ConfigError: a wanted host is no host name or address.
    """
    for host in wanted:
        split_address(f"{host}:1")
    if wanted:
        return tuple(wanted)
    if listened_host not in WILDCARDS:
        return (listened_host,)
    found = _own_addresses()
    if not found:
        raise ConfigError(
            "this machine has no network address but loopback; connect it to a network, say --advertise HOST, "
            "or listen on 127.0.0.1"
        )
    return found


def _own_addresses() -> tuple[str, ...]:
    statuses = psutil.net_if_stats()
    return tuple(
        address.address
        for name, addresses in sorted(psutil.net_if_addrs().items())
        if name in statuses and statuses[name].isup
        for address in addresses
        if address.family is socket.AF_INET
        and not is_loopback(address.address)
        and not ipaddress.ip_address(address.address).is_link_local
    )
