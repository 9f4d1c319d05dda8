"""AgentService: the devices' control streams."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc.aio

from coordinator.fleet.registry import FleetRegistry
from protos import agents_pb2 as pb
from protos import agents_pb2_grpc


class AgentServicer(agents_pb2_grpc.AgentServiceServicer):
    """Hands every stream to the fleet."""

    def __init__(self, fleet: FleetRegistry) -> None:
        self._fleet = fleet

    async def Attach(
        self,
        request_iterator: AsyncIterator[pb.AgentEvent],
        context: grpc.aio.ServicerContext[pb.AgentEvent, pb.AgentCommand],
    ) -> AsyncIterator[pb.AgentCommand]:
        """One agent, from hello to its end."""
        async for command in self._fleet.serve(aiter(request_iterator)):
            yield command
