"""Where a device stands on the network: its proof of who it is, and how its workers reach and are reached."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from plutino.errors import UnreachableError
from plutino.security.tls import Credentials
from plutino.wire.channel import is_loopback, split_address

_WILDCARDS = frozenset({"0.0.0.0", "[::]"})


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceNetwork:
    """What the agent tells its workers beside their assignments; the default is a device without TLS, on loopback."""

    identity: str | None = None
    """The device's identity file, which renewals replace; None without TLS."""
    listen_host: str = "127.0.0.1"
    """Where workers listen for their peers."""
    advertised_host: str | None = None
    """Where peers dial them; None: the host listened on."""
    coordinator_host: str | None = None
    """Where this device reaches the coordinator; None: at the address in the assignment."""

    @classmethod
    def of_member(
        cls, identity: Path, coordinator_address: str, *, listen: str | None = None, advertise: str | None = None
    ) -> DeviceNetwork:
        """The network of a device that has joined.

        Args:
            identity: its identity file.
            coordinator_address: where it reaches the coordinator.
            listen: host that workers listen on; None: all addresses, or loopback where the coordinator is there.
            advertise: host that peers dial; None: the address that this device has towards the coordinator.

        Raises:
            UnreachableError: there is no way to the coordinator's host.
        """
        host, port = split_address(coordinator_address)
        listen_host = listen or ("127.0.0.1" if is_loopback(host) else "0.0.0.0")
        return cls(
            identity=str(identity.absolute()),
            listen_host=listen_host,
            advertised_host=advertise or (own_address_towards(host, port) if listen_host in _WILDCARDS else None),
            coordinator_host=host,
        )

    def credentials(self) -> Credentials | None:
        """The device's; None without TLS.

        Raises:
            SecurityError: the identity cannot be read.
        """
        return None if self.identity is None else Credentials(Path(self.identity))

    def reached(self, address: str) -> str:
        """An address of the coordinator as this device reaches it: its own host may be known elsewhere by another."""
        if self.coordinator_host is None:
            return address
        _, port = split_address(address)
        return f"{self.coordinator_host}:{port}"

    def to_json(self) -> dict[str, Any]:
        """Plain values for the worker's standard input."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> DeviceNetwork:
        """The value that :meth:`to_json` was made from."""
        return cls(**values)


def own_address_towards(host: str, port: int) -> str:
    """The address of this machine on the way to a host; nothing is sent.

    Raises:
        UnreachableError: there is no way to it.
    """
    bare_host = host.removeprefix("[").removesuffix("]")
    try:
        family, kind, _, _, target = socket.getaddrinfo(bare_host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)
            own = str(probe.getsockname()[0])
    except OSError as error:
        raise UnreachableError(
            f"this device has no way to {host} ({error}); connect it to that network, or say --advertise HOST"
        ) from error
    return f"[{own}]" if ":" in own else own
