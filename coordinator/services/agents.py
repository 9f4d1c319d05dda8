"""AgentService: the devices' control streams."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc.aio

from coordinator.fleet.registry import FleetRegistry
from plutino.errors import SecurityError
from plutino.security.interceptors import caller_of
from plutino.wire.status import abort_with_aio
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
        caller = caller_of(context.auth_context())
        try:
            async for command in self._fleet.serve(aiter(request_iterator), None if caller is None else caller.name):
                yield command
        except SecurityError as error:
            await abort_with_aio(context, error)
