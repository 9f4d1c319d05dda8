"""WorkerService: the workers' control streams."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import grpc.aio

from coordinator.jobs.worker_link import JobWorkers
from plutino.errors import SecurityError
from plutino.security.interceptors import caller_of
from plutino.types import AgentId, JobId, WorkerRef
from plutino.wire.convert import worker_from_proto
from plutino.wire.status import abort_with_aio
from protos import workers_pb2 as pb
from protos import workers_pb2_grpc


class WorkerServicer(workers_pb2_grpc.WorkerServiceServicer):
    """Hands every stream to its job."""

    def __init__(
        self,
        workers_of: Callable[[JobId], JobWorkers | None],
        owner_of: Callable[[WorkerRef], AgentId | None],
    ) -> None:
        self._workers_of = workers_of
        self._owner_of = owner_of

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
        caller = caller_of(context.auth_context())
        owner = self._owner_of(ref)
        if caller is not None and owner is not None and caller.name != owner:
            await abort_with_aio(context, SecurityError(f"{ref} runs on {owner}; {caller} cannot speak for it"))
        workers = self._workers_of(ref.job_id)
        if workers is None:
            yield pb.WorkerCommand(finish=pb.Finish(reason=f"job {ref.job_id} is not running"))
            return
        async for command in workers.serve(ref, first.hello, events):
            yield command
