"""Where a coordinator is reached."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoints:
    """Where this coordinator is reached."""

    devices_address: str
    """Agents and workers."""
    people_address: str
    """The command line, programs and runners."""
    bulk_address: str
    join_addresses: tuple[str, ...] = ()
    """Where devices join, as other machines reach it; empty without TLS."""
    join_token: str = field(default="", repr=False)
    """Lets one device in; empty without TLS."""
    runner_identity: Path | None = None
    """The identity file of jobs' runners; None without TLS."""
