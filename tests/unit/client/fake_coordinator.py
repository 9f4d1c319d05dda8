"""A coordinator as clients see it: a real gRPC server that answers from plain values."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from plutino.errors import PlutinoError, UnknownJobError
from plutino.events import JobEvent, event_json
from plutino.wire.channel import Lane, bind, sync_server
from plutino.wire.status import abort_with
from protos import jobs_pb2 as pb
from protos import jobs_pb2_grpc


class FakeCoordinator(jobs_pb2_grpc.JobServiceServicer):
    """One job, ``fake-1``; set what it answers, start it, read what it was asked."""

    def __init__(self) -> None:
        self.state = "running"
        self.events: list[JobEvent] = []
        self.plan: Mapping[str, Any] = {}
        self.problem: Mapping[str, Any] = {}
        self.detail: Mapping[str, Any] = {}
        self.devices: list[Mapping[str, Any]] = []
        self.error: PlutinoError | None = None
        self.submitted: list[pb.SubmitRequest] = []
        self.watched_after: list[int] = []
        self.break_after: int | None = None
        """The first watch breaks behind the event with this number."""
        self.hold = threading.Event()
        """Streams stay open until it is set."""
        self.hold.set()

    def start(self, address: str = "127.0.0.1:0") -> str:
        self._executor = ThreadPoolExecutor(4)
        self._server = sync_server(Lane.REPORT, self._executor)
        jobs_pb2_grpc.add_JobServiceServicer_to_server(self, self._server)
        bound = bind(self._server, address)
        self._server.start()
        return bound

    def stop(self) -> None:
        self.hold.set()
        self._server.stop(None).wait(5)  # a second time it does nothing
        self._executor.shutdown()

    def Submit(self, request: pb.SubmitRequest, context: grpc.ServicerContext) -> pb.SubmitResponse:
        self._answer_or_abort(context)
        self.submitted.append(request)
        return pb.SubmitResponse(job_id="fake-1")

    def Plan(self, request: pb.PlanRequest, context: grpc.ServicerContext) -> pb.PlanResponse:
        self._answer_or_abort(context)
        return pb.PlanResponse(plan_json=json.dumps(self.plan), problem_json=json.dumps(self.problem))

    def List(self, request: pb.ListRequest, context: grpc.ServicerContext) -> pb.ListResponse:
        return pb.ListResponse(jobs=[self._summary()])

    def Get(self, request: pb.GetRequest, context: grpc.ServicerContext) -> pb.GetResponse:
        self._find(request.job_id, context)
        return pb.GetResponse(summary=self._summary(), detail_json=json.dumps(self.detail))

    def Watch(self, request: pb.WatchRequest, context: grpc.ServicerContext) -> Iterator[pb.WatchResponse]:
        self._find(request.job_id, context)
        self.watched_after.append(request.after)
        for number, event in enumerate(self.events, start=1):
            if number > request.after:
                yield pb.WatchResponse(number=number, at_s=float(number), kind=event.kind, json=event_json(event))
            if number == self.break_after and request.after < number:
                context.abort(grpc.StatusCode.UNAVAILABLE, "the coordinator is restarted")
        self.hold.wait(10)

    def Cancel(self, request: pb.CancelRequest, context: grpc.ServicerContext) -> pb.CancelResponse:
        self._answer_or_abort(context)
        self.state = "cancelled"
        return pb.CancelResponse(state=self.state)

    def Pause(self, request: pb.PauseRequest, context: grpc.ServicerContext) -> pb.PauseResponse:
        self._answer_or_abort(context)
        self.state = "paused"
        return pb.PauseResponse(state=self.state)

    def Resume(self, request: pb.ResumeRequest, context: grpc.ServicerContext) -> pb.ResumeResponse:
        self._answer_or_abort(context)
        self.state = "running"
        return pb.ResumeResponse(state=self.state)

    def Devices(self, request: pb.DevicesRequest, context: grpc.ServicerContext) -> pb.DevicesResponse:
        return pb.DevicesResponse(devices_json=json.dumps(self.devices))

    def _find(self, job_id: str, context: grpc.ServicerContext) -> None:
        if not "fake-1".startswith(job_id):
            abort_with(context, UnknownJobError(f"no job {job_id!r}; the latest: fake-1"))

    def _answer_or_abort(self, context: grpc.ServicerContext) -> None:
        if self.error is not None:
            abort_with(context, self.error)

    def _summary(self) -> pb.JobSummary:
        return pb.JobSummary(
            job_id="fake-1", name="fake", state=self.state, reason="", step=2, total_steps=4, submitted_at_s=100.0
        )
