"""RunnerService: the streams of jobs' runners."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import grpc.aio

from coordinator.jobs.runner_link import RunnerLink
from plutino.types import JobId
from protos import runners_pb2 as pb
from protos import runners_pb2_grpc


class RunnerServicer(runners_pb2_grpc.RunnerServiceServicer):
    """Hands every stream of this incarnation to its job."""

    def __init__(self, incarnation: int, link_of: Callable[[JobId], RunnerLink | None]) -> None:
        self._incarnation = incarnation
        self._link_of = link_of

    async def Run(
        self,
        request_iterator: AsyncIterator[pb.RunnerEvent],
        context: grpc.aio.ServicerContext[pb.RunnerEvent, pb.RunnerCommand],
    ) -> AsyncIterator[pb.RunnerCommand]:
        """One runner, from hello to its end; one that another incarnation started is sent away."""
        events = aiter(request_iterator)
        first = await anext(events, None)
        link = None if first is None else self._link_of(JobId(first.hello.job_id))
        if first is None or link is None or first.hello.incarnation != self._incarnation:
            yield pb.RunnerCommand(finish=pb.RunnerFinish())
            return
        async for command in link.serve(events):
            yield command
