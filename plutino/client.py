"""The SDK: what the command line can do, from a program.

::

    with Client.local() as client:
        job_id = client.submit(load_spec(Path("job.yaml")))
        for numbered in client.watch(job_id):
            print(numbered.event)

Blocking calls with bounded waits; needs neither torch nor Ray. Every method raises UnreachableError if no coordinator
answers, and otherwise the error class that the coordinator met.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import grpc

from plutino.doctor.wire import Dialled, dialled
from plutino.endpoint import default_state_dir, read_endpoint
from plutino.errors import PlutinoError, UnreachableError
from plutino.events import JobEvent, parse_event
from plutino.job.spec import JobSpec
from plutino.llm2llm_client import Loops
from plutino.members import Members
from plutino.security.tls import Credentials
from plutino.sweep_client import Sweeps
from plutino.types import JobId
from plutino.wire.channel import Lane, RenewedChannel
from plutino.wire.status import error_from_rpc
from protos import jobs_pb2 as pb
from protos import jobs_pb2_grpc

ENDED_STATES = frozenset({"succeeded", "cancelled", "failed"})
"""States that a job never leaves."""

_CALL_TIMEOUT_S = 30.0
_PLAN_TIMEOUT_S = 600.0
"""A plan reads all rows and measures every device that was not measured yet."""
_LINKS_TIMEOUT_S = 120.0
_RECONNECT_PAUSE_S = 0.2
_STEADY_S = 2.0
"""A stream that lasted so long or brought an event was a good one; others count as one absence of the coordinator."""
_RETRIED_CODES = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED})
"""What a watcher sees of a coordinator that ends or is killed."""

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSummary:
    """One line about a job."""

    job_id: JobId
    name: str
    state: str
    reason: str
    """Why the job is in this state, for a person."""
    step: int
    """Optimiser steps done."""
    total_steps: int
    """0 until the rows are read."""
    submitted_at_s: float
    """Seconds since 1970, UTC."""
    ended_at_s: float | None
    """None while the job lives."""
    adapter_dir: str | None
    """None until the adapter is published."""

    @property
    def has_ended(self) -> bool:
        """The job is in a state that it never leaves."""
        return self.state in ENDED_STATES


@dataclass(frozen=True, slots=True, kw_only=True)
class JobDetail:
    """Everything that is stored of a job."""

    summary: JobSummary
    detail: Mapping[str, Any]
    """spec, plan, numerics, ledger, evaluations, scores, transitions; see ``docs``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NumberedEvent:
    """An event with its place in the job's history."""

    number: int
    """Counted from 1 up; give it to :meth:`Client.watch` as ``after`` to go on behind it."""
    at_s: float
    """Seconds since 1970, UTC."""
    event: JobEvent


class Client:
    """A coordinator, seen from a program. Close it, or use it as a context manager."""

    def __init__(self, address: str, credentials: Credentials | None = None) -> None:
        """Dials nothing before the first call.

        Args:
            address: the coordinator's ``host:port`` for people and programs.
            credentials: a person's, made by the coordinator in its state folder; None for one that runs without TLS.

        Raises:
            ConfigError: the address is malformed.
            SecurityError: the address is not on loopback, and there are no credentials.
        """
        self.address = address
        self._channel = RenewedChannel(address, Lane.REPORT, credentials)

    @classmethod
    def local(cls, state_dir: Path | None = None) -> Client:
        """The coordinator of a state folder on this machine; None means this user's default one.

        Raises:
            UnreachableError: no coordinator has run there.
            SecurityError: this user may not use it.
        """
        endpoint = read_endpoint(state_dir or default_state_dir())
        identity = endpoint.get("person_identity")
        return cls(endpoint["people_address"], Credentials(Path(identity)) if identity else None)

    @property
    def _stub(self) -> jobs_pb2_grpc.JobServiceStub:
        return jobs_pb2_grpc.JobServiceStub(self._channel.current())

    @property
    def members(self) -> Members:
        """Join tokens, revocations and their audit."""
        return Members(self._channel.current, self._call)

    @property
    def sweeps(self) -> Sweeps:
        """Jobs that are compared with each other."""
        return Sweeps(self._channel.current, self._call)

    @property
    def loops(self) -> Loops:
        """LLM2LLM loops."""
        return Loops(self._channel.current, self._call)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the connection; jobs go on."""
        self._channel.close()

    def submit(self, spec: JobSpec, *, idempotency_key: str | None = None) -> JobId:
        """Hand a job in; it is durable when this returns.

        Args:
            spec: the job, with absolute paths as :func:`plutino.job.spec.load_spec` gives them.
            idempotency_key: a second submit with the same key gives the first one's job. None: always a new job.

        Raises:
            ConfigError: the spec or its output folder cannot be used.
            ModelError: the base model cannot be used.
        """
        request = pb.SubmitRequest(
            spec_json=spec.model_dump_json(), idempotency_key=idempotency_key or uuid.uuid4().hex
        )
        # Before its method is chosen, devices measure themselves with several.
        is_open = spec.auto_method is not None and spec.auto_method.is_open
        timeout_s = _PLAN_TIMEOUT_S if is_open else _CALL_TIMEOUT_S
        response: pb.SubmitResponse = self._call(self._stub.Submit, request, timeout_s=timeout_s)
        return JobId(response.job_id)

    def plan(self, spec: JobSpec) -> Mapping[str, Any]:
        """The plan that a job would get if it were alone; reserves nothing.

        Returns:
            Values of ``partitioner.plan.Plan``.

        Raises:
            InfeasiblePlanError: the job does not fit the devices that are in.
            ModelError, DataError: the base model or the rows cannot be used.
        """
        plan, _ = self.plan_with_problem(spec)
        assert not isinstance(plan, str), "a refusal was not asked for"
        return plan

    def plan_with_problem(
        self, spec: JobSpec, *, even_if_refused: bool = False
    ) -> tuple[Mapping[str, Any] | str, Mapping[str, Any]]:
        """The same, and values of ``coordinator.scheduling.problem.PlanningProblem``: what the plan was made from.

        Args:
            spec: the job.
            even_if_refused: give the reason instead of a plan where nothing fits, and the problem with it.
        """
        request = pb.PlanRequest(spec_json=spec.model_dump_json(), even_if_refused=even_if_refused)
        response: pb.PlanResponse = self._call(self._stub.Plan, request, timeout_s=_PLAN_TIMEOUT_S)
        plan = response.refusal or json.loads(response.plan_json)
        return plan, json.loads(response.problem_json or "{}")

    def jobs(self) -> list[JobSummary]:
        """All jobs, oldest first."""
        response: pb.ListResponse = self._call(self._stub.List, pb.ListRequest())
        return [_summary(job) for job in response.jobs]

    def job(self, job_id: str) -> JobDetail:
        """Everything that is stored of a job; the unambiguous beginning of an id will do.

        Raises:
            UnknownJobError: no job has this id.
        """
        response: pb.GetResponse = self._call(self._stub.Get, pb.GetRequest(job_id=job_id))
        return JobDetail(summary=_summary(response.summary), detail=json.loads(response.detail_json))

    def trace(self, job_id: str, step: int | None = None) -> tuple[str, str]:
        """A recorded step and what was predicted of it.

        Args:
            job_id: the job, or the unambiguous beginning of its id.
            step: which one; None: the newest that is recorded.

        Returns:
            JSON of ``partitioner.trace.StepTrace`` and of ``coordinator.artifacts.traces.PlannedEpoch``; the latter is
            empty where the plan was not kept.

        Raises:
            UnknownJobError: no job has this id, or no such step was recorded.
        """
        response: pb.TraceResponse = self._call(self._stub.Trace, pb.TraceRequest(job_id=job_id, step=step))
        return response.trace_json, response.planned_json

    def watch(self, job_id: str, *, after: int = 0, reconnect_s: float = 60.0) -> Iterator[NumberedEvent]:
        """Events of a job in order, each once, as they come; ends when the job has ended.

        Goes on where it was when the coordinator is restarted.

        Args:
            job_id: the job; the unambiguous beginning of its id will do.
            after: only events with a larger number.
            reconnect_s: how long to wait for a coordinator that went away.

        Raises:
            UnknownJobError: no job has this id.
            UnreachableError: the coordinator did not come back in time.
        """
        away_since_s = time.monotonic()
        had_ended = False
        while True:
            dialled_s, before = time.monotonic(), after
            stream = self._stub.Watch(pb.WatchRequest(job_id=job_id, after=after))
            try:
                for response in stream:
                    after = response.number
                    yield NumberedEvent(
                        number=after, at_s=response.at_s, event=parse_event(response.kind, response.json)
                    )
                # A coordinator that is asked to end may end its streams in good order too. Only a stream that was
                # opened after the job's end is known to have brought everything.
                if had_ended:
                    return
                had_ended = self.job(job_id).summary.has_ended
                if had_ended:
                    continue
            except grpc.RpcError as error:
                self._raise_unless_away(error)
            except UnreachableError:
                pass  # counted as away below
            finally:
                stream.cancel()
            now_s = time.monotonic()
            if after > before or now_s - dialled_s > _STEADY_S:
                away_since_s = now_s
            self._await_return(away_since_s + reconnect_s - now_s, job_id)

    def cancel(self, job_id: str) -> str:
        """End a job and free everything it holds.

        Returns:
            The job's state afterwards.

        Raises:
            UnknownJobError: no job has this id.
            InvalidTransitionError: it has ended already.
        """
        response: pb.CancelResponse = self._call(self._stub.Cancel, pb.CancelRequest(job_id=job_id))
        return response.state

    def pause(self, job_id: str) -> str:
        """Let a running job hold between two steps; its workers keep their memory.

        Returns:
            The job's state afterwards.

        Raises:
            UnknownJobError: no job has this id.
            InvalidTransitionError: it is not running.
        """
        response: pb.PauseResponse = self._call(self._stub.Pause, pb.PauseRequest(job_id=job_id))
        return response.state

    def resume(self, job_id: str) -> str:
        """Let a paused job go on; results and errors as :meth:`pause`."""
        response: pb.ResumeResponse = self._call(self._stub.Resume, pb.ResumeRequest(job_id=job_id))
        return response.state

    def devices(self) -> list[Mapping[str, Any]]:
        """All devices that ever attached to this run of the coordinator, with what they give and hold."""
        response: pb.DevicesResponse = self._call(self._stub.Devices, pb.DevicesRequest())
        devices: list[Mapping[str, Any]] = json.loads(response.devices_json)
        return devices

    def check_links(self) -> list[Dialled]:
        """Let every device that is in dial every other one; seconds where a device does not answer."""
        request = pb.CheckLinksRequest()
        response: pb.CheckLinksResponse = self._call(self._stub.CheckLinks, request, timeout_s=_LINKS_TIMEOUT_S)
        return dialled(response.dials)

    def _call(self, method: Callable[..., Result], request: Any, *, timeout_s: float = _CALL_TIMEOUT_S) -> Result:
        try:
            return method(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise self._translated(error) from error

    def _translated(self, error: grpc.RpcError) -> PlutinoError:
        translated = error_from_rpc(error, self.address)
        if type(translated) is UnreachableError and error.code() is grpc.StatusCode.UNAVAILABLE:
            return UnreachableError(
                f"no coordinator answers at {self.address}; start it with: plutino up "
                "(with the same --state-dir, its jobs go on where they were)"
            )
        return translated

    def _raise_unless_away(self, error: grpc.RpcError) -> None:
        translated = self._translated(error)
        if not (type(translated) is UnreachableError and error.code() in _RETRIED_CODES):
            raise translated from error

    def _await_return(self, left_s: float, job_id: str) -> None:
        """Wait until the coordinator can be dialled again."""
        # A server that accepts connections and ends every call at once must not be asked in a tight loop.
        time.sleep(_RECONNECT_PAUSE_S)
        ready = grpc.channel_ready_future(self._channel.current())
        try:
            if left_s <= 0:
                raise grpc.FutureTimeoutError
            ready.result(timeout=left_s)
        except grpc.FutureTimeoutError as error:
            ready.cancel()
            raise UnreachableError(
                f"the coordinator at {self.address} went away and did not come back; start it again with: plutino up, "
                f"then: plutino watch {job_id}"
            ) from error


def _summary(job: pb.JobSummary) -> JobSummary:
    return JobSummary(
        job_id=JobId(job.job_id),
        name=job.name,
        state=job.state,
        reason=job.reason,
        step=job.step,
        total_steps=job.total_steps,
        submitted_at_s=job.submitted_at_s,
        ended_at_s=job.ended_at_s or None,
        adapter_dir=job.adapter_dir or None,
    )
