"""WorkerService: the workers' control streams."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import grpc.aio

from coordinator.jobs.worker_link import JobWorkers
from plutino.types import JobId
from plutino.wire.convert import worker_from_proto
from protos import workers_pb2 as pb
from protos import workers_pb2_grpc


class WorkerServicer(workers_pb2_grpc.WorkerServiceServicer):
    """Hands every stream to its job."""

    def __init__(self, workers_of: Callable[[JobId], JobWorkers | None]) -> None:
        self._workers_of = workers_of

    async def Work(
        self,
        request_iterator: AsyncIterator[pb.WorkerEvent],
        context: grpc.aio.ServicerContext[pb.WorkerEvent, pb.WorkerCommand],
    ) -> AsyncIterator[pb.WorkerCommand]:
        """One worker, from hello to its end."""
        events = aiter(request_iterator)
        first = await anext(events, None)
        if first is None or not first.HasField("hello"):
            return
        ref = worker_from_proto(first.hello.worker)
        workers = self._workers_of(ref.job_id)
        if workers is None:
            yield pb.WorkerCommand(finish=pb.Finish(reason=f"job {ref.job_id} is not running"))
            return
        async for command in workers.serve(ref, first.hello, events):
            yield command
