"""Where a device stands on the network: its proof of who it is, and how its workers reach and are reached."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from plutino.security.tls import Credentials
from plutino.wire.channel import split_address


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
