"""Which device reaches which, found by letting them dial each other; the coordinator itself dials no device."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from coordinator.fleet.doors import knock, open_door
from coordinator.fleet.membership import Device
from coordinator.fleet.registry import FleetRegistry
from plutino.errors import AgentError, SecurityError
from plutino.wire.channel import split_address

MAX_DIALLERS = 3
"""Devices that are asked to dial one address: a second and a third tell a broken dialler from a closed door."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dial:
    """One device that dialled another."""

    from_device: str
    to_device: str
    same_host: bool
    seconds: float = 0.0
    error: str = ""
    """Why it was not reached; empty if it was."""


async def check_links(fleet: FleetRegistry, *, has_tls: bool) -> list[Dial]:
    """Let every device that is in dial every other one; one door after the other, all others at once."""
    dials: list[Dial] = []
    for to_device in fleet.devices:
        others = [device for device in fleet.devices if device.agent_id != to_device.agent_id]
        if not others:
            continue
        try:
            address = await open_door(fleet, to_device.agent_id)
        except AgentError as error:
            dials += [_dial(other, to_device.name, to_device.host_id, error=str(error)) for other in others]
            continue
        node_id = str(to_device.agent_id) if has_tls else ""
        dials += await _knock_all(fleet, others, address, node_id, to_device.name, to_device.host_id)
    return dials


async def dial_back(fleet: FleetRegistry, address: str, *, node_id: str, host_id: str, caller_host: str) -> list[Dial]:
    """Let a few devices dial an address where somebody on ``caller_host`` says to listen.

    Args:
        fleet: who dials.
        address: where.
        node_id: whose certificate must answer there; empty without TLS. It does not dial itself.
        host_id: devices of this host are asked last: they prove nothing about a network.
        caller_host: where the caller's connection comes from.

    Raises:
        ConfigError: the address is malformed.
        SecurityError: the address is not the caller's: devices are not lent out to scan a network.
    """
    host, _ = split_address(address)
    if host.strip("[]") != caller_host:
        raise SecurityError(
            f"{address} is not where the call comes from ({caller_host}), so no device is asked to dial it; "
            "listen on the address that the coordinator sees"
        )
    others = [device for device in fleet.devices if device.agent_id != node_id]
    diallers = sorted(others, key=lambda device: (device.host_id == host_id, device.agent_id))[:MAX_DIALLERS]
    return await _knock_all(fleet, diallers, address, node_id, "", host_id)


async def _knock_all(
    fleet: FleetRegistry, diallers: Sequence[Device], address: str, node_id: str, to_device: str, to_host_id: str
) -> list[Dial]:
    async def dialled(device: Device) -> Dial:
        try:
            seconds = await knock(fleet, device.agent_id, address, node_id)
        except AgentError as error:
            return _dial(device, to_device, to_host_id, error=str(error))
        return _dial(device, to_device, to_host_id, seconds=seconds)

    return list(await asyncio.gather(*(dialled(device) for device in diallers)))


def _dial(device: Device, to_device: str, to_host_id: str, *, seconds: float = 0.0, error: str = "") -> Dial:
    return Dial(
        from_device=device.name,
        to_device=to_device,
        same_host=device.host_id == to_host_id,
        seconds=seconds,
        error=error,
    )
