"""What a device tells the coordinator of its workers."""

from __future__ import annotations

import logging
from collections.abc import Callable

from plutino.types import JobId, WorkerRef
from protos import agents_pb2

logger = logging.getLogger(__name__)


class PoolReports:
    """Turns what happened to workers into events of the control stream.

    Args:
        report: takes an event; it waits there while the stream is down.
    """

    def __init__(self, report: Callable[[agents_pb2.AgentEvent], None]) -> None:
        self._report = report

    def started(self, ref: WorkerRef, pid: int) -> None:
        """A worker works for a job."""
        started = agents_pb2.WorkerStarted(worker=worker_id(ref), pid=pid)
        self._report(agents_pb2.AgentEvent(worker_started=started))

    def exited(self, ref: WorkerRef, exit_code: int, reason: str, *, out_of_memory: bool) -> None:
        """A worker works for its job no more."""
        logger.info("%s ended with exit code %d: %s", ref, exit_code, reason)
        exited = agents_pb2.WorkerExited(
            worker=worker_id(ref), exit_code=exit_code, reason=reason, out_of_memory=out_of_memory
        )
        self._report(agents_pb2.AgentEvent(worker_exited=exited))

    def profile(
        self,
        request_id: str,
        *,
        timings_json: str = "",
        error: str = "",
        is_kept: bool = False,
        lacked_company: bool = False,
    ) -> None:
        """What was measured, now or for an earlier request, or why nothing was; without either: nothing is kept."""
        result = agents_pb2.ProfileResult(
            request_id=request_id,
            timings_json=timings_json,
            error=error,
            is_kept=is_kept,
            lacked_company=lacked_company,
        )
        self._report(agents_pb2.AgentEvent(profile_result=result))

    def profile_reached(self, request_id: str, milestone: int) -> None:
        """A measurement waits, or computes on, until the other devices of the host are as far."""
        reached = agents_pb2.ProfileReached(request_id=request_id, milestone=milestone)
        self._report(agents_pb2.AgentEvent(profile_reached=reached))


def worker_id(ref: WorkerRef) -> agents_pb2.WorkerId:
    """A worker's name on the wire."""
    return agents_pb2.WorkerId(
        job_id=ref.job_id, plan_epoch=ref.plan_epoch, stage_index=ref.stage_index, replica_index=ref.replica_index
    )


def worker_ref(message: agents_pb2.WorkerId) -> WorkerRef:
    """A worker's name from the wire."""
    return WorkerRef(JobId(message.job_id), message.plan_epoch, message.stage_index, message.replica_index)
