"""Hardware to protobuf and back."""

from __future__ import annotations

from plutino.hardware import Hardware
from protos import agents_pb2


def hardware_to_proto(hardware: Hardware) -> agents_pb2.Hardware:
    """The message of a value."""
    return agents_pb2.Hardware(
        kind=hardware.kind,
        name=hardware.name,
        machine=hardware.machine,
        capability=hardware.capability,
        arithmetic=hardware.arithmetic,
        memory_bytes=hardware.memory_bytes,
        idle_accelerators=hardware.idle_accelerators,
    )


def hardware_from_proto(message: agents_pb2.Hardware) -> Hardware:
    """The value of a message."""
    return Hardware(
        kind=message.kind,
        name=message.name,
        machine=message.machine,
        capability=message.capability,
        arithmetic=message.arithmetic,
        memory_bytes=message.memory_bytes,
        idle_accelerators=tuple(message.idle_accelerators),
    )
