"""Which devices of one host compute on the same cores: pure.

Two devices on the same cores are no faster than one, so a stage's replicas must not be such devices. Devices of one
host whose threads (or quotas, as of containers) together fit its cores, or that are pinned to different ones, do not
get into each other's way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from coordinator.fleet.membership import Device
from plutino.types import AgentId


def shared_cores(devices: Sequence[Device], threads: Mapping[AgentId, int]) -> dict[AgentId, str]:
    """For every device a name that it shares with those on the same cores; empty if it has its own.

    Args:
        devices: the devices that may work at the same time.
        threads: how many threads each of them works with.
    """
    found: dict[AgentId, str] = {}
    for together in _overlapping(devices):
        processors = {processor for device in together for processor in device.processors}
        are_known = all(device.processors for device in together)
        is_room = sum(_taken(device, threads[device.agent_id]) for device in together) <= len(processors)
        has_own = len(together) == 1 or (are_known and is_room and together[0].hardware.kind == "cpu")
        name = "" if has_own else f"{together[0].host_id} {min(device.agent_id for device in together)}"
        found |= {device.agent_id: name for device in together}
    return found


def _taken(device: Device, threads: int) -> float:
    """Processors that a device keeps busy."""
    return threads if device.processor_quota is None else min(threads, device.processor_quota)


def _overlapping(devices: Sequence[Device]) -> list[list[Device]]:
    """Devices gathered so that whoever could meet on a core, directly or through others, is together."""
    gathered: list[list[Device]] = []
    for device in devices:
        apart: list[list[Device]] = []
        together = [device]
        for others in gathered:
            if any(_may_meet(device, other) for other in others):
                together = [*others, *together]
            else:
                apart.append(others)
        gathered = [*apart, together]
    return gathered


def _may_meet(one: Device, other: Device) -> bool:
    if one.host_id != other.host_id or one.hardware.kind != other.hardware.kind:
        return False
    if not one.processors or not other.processors:
        return True
    return not set(one.processors).isdisjoint(other.processors)
