"""What devices are asked about each other: to listen for a moment, to dial, and to measure the way."""

from __future__ import annotations

from coordinator.fleet.registry import FleetRegistry
from plutino.doctor.burst import MEASURE_TIMEOUT_S, LinkFigures
from plutino.doctor.door import DOOR_S, KNOCK_TIMEOUT_S
from plutino.types import AgentId
from protos import agents_pb2 as pb

_GRACE_S = 2.0
"""What an answer may take on its way beyond the time that the device itself has."""


async def open_door(fleet: FleetRegistry, agent_id: AgentId) -> str:
    """Let a device listen for a moment where its workers would; the address that others would dial.

    Raises:
        AgentLostError: it left.
        AgentError: it cannot listen, or did not answer in time.
    """
    return await fleet.ask(
        agent_id,
        lambda link: link.doors,
        lambda request_id: pb.AgentCommand(open_door=pb.OpenDoor(request_id=request_id, seconds=DOOR_S)),
        KNOCK_TIMEOUT_S + _GRACE_S,
    )


async def knock(fleet: FleetRegistry, agent_id: AgentId, address: str, node_id: str) -> float:
    """Let a device dial an address; seconds that it took. ``node_id`` must answer there; empty without TLS.

    Raises:
        AgentLostError: the device left.
        AgentError: nobody answered it, or it did not answer in time.
    """
    return await fleet.ask(
        agent_id,
        lambda link: link.knocks,
        lambda request_id: pb.AgentCommand(
            knock=pb.Knock(request_id=request_id, address=address, timeout_s=KNOCK_TIMEOUT_S, node_id=node_id)
        ),
        KNOCK_TIMEOUT_S + _GRACE_S,
    )


async def measure(fleet: FleetRegistry, agent_id: AgentId, address: str, node_id: str) -> LinkFigures:
    """Let a device measure the way to a door; arguments and errors as :func:`knock`."""
    return await fleet.ask(
        agent_id,
        lambda link: link.bursts,
        lambda request_id: pb.AgentCommand(
            knock=pb.Knock(request_id=request_id, address=address, node_id=node_id, measure=True)
        ),
        MEASURE_TIMEOUT_S + _GRACE_S,
    )
