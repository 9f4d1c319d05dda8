"""JobService: what people and programs ask."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import grpc.aio

from coordinator.fleet.link_map import LinkMap
from coordinator.fleet.links import check_links
from coordinator.fleet.membership import Device
from coordinator.fleet.registry import FleetRegistry
from coordinator.jobs.ability import ability_json, ability_of
from coordinator.jobs.job_ids import find_job
from coordinator.jobs.manager import JobManager
from coordinator.jobs.record import JobRecord
from coordinator.security.records import MemberRecord
from coordinator.services.doctor import dial_to_proto
from coordinator.storage.base import Store
from plutino.errors import ConfigError, PlutinoError
from plutino.events import event_json
from plutino.job.spec import JobSpec, parse_spec
from plutino.security.interceptors import caller_of
from plutino.types import AgentId
from plutino.wire.status import abort_with_aio
from protos import jobs_pb2 as pb
from protos import jobs_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]


class JobServicer(jobs_pb2_grpc.JobServiceServicer):
    """Parses, calls the manager, maps errors."""

    def __init__(
        self,
        manager: JobManager,
        store: Store,
        fleet: FleetRegistry,
        link_map: LinkMap,
        members: Callable[[], tuple[MemberRecord, ...]] | None = None,
    ) -> None:
        self._members = members
        self._manager = manager
        self._store = store
        self._fleet = fleet
        self._link_map = link_map

    async def Submit(self, request: pb.SubmitRequest, context: Context) -> pb.SubmitResponse:
        """Store a job and begin it."""
        try:
            record = await self._manager.submit(_spec(request.spec_json), idempotency_key=request.idempotency_key)
        except PlutinoError as error:
            await abort_with_aio(context, error)
        return pb.SubmitResponse(job_id=record.job_id)

    async def Plan(self, request: pb.PlanRequest, context: Context) -> pb.PlanResponse:
        """The plan that a job would get now."""
        try:
            problem, plan = await self._manager.plan(_spec(request.spec_json), must_fit=not request.even_if_refused)
        except PlutinoError as error:
            await abort_with_aio(context, error)
        return pb.PlanResponse(
            plan_json="" if isinstance(plan, str) else plan.model_dump_json(),
            problem_json=problem.model_dump_json(),
            refusal=plan if isinstance(plan, str) else "",
        )

    async def List(self, request: pb.ListRequest, context: Context) -> pb.ListResponse:
        """All jobs, oldest first."""
        return pb.ListResponse(jobs=[_summary(record) for record in self._store.jobs()])

    async def Get(self, request: pb.GetRequest, context: Context) -> pb.GetResponse:
        """Everything that is stored of a job."""
        try:
            record = find_job(self._store, request.job_id)
        except PlutinoError as error:
            await abort_with_aio(context, error)
        return pb.GetResponse(summary=_summary(record), detail_json=json.dumps(_detail(self._store, record)))

    async def Trace(self, request: pb.TraceRequest, context: Context) -> pb.TraceResponse:
        """A recorded step and what was predicted of it."""
        try:
            record = find_job(self._store, request.job_id)
            step = request.step if request.HasField("step") else None
            trace, planned = await asyncio.to_thread(self._manager.traces.step, record.job_id, step)
        except PlutinoError as error:
            await abort_with_aio(context, error)
        return pb.TraceResponse(
            trace_json=trace.model_dump_json(), planned_json="" if planned is None else planned.model_dump_json()
        )

    async def Watch(self, request: pb.WatchRequest, context: Context) -> AsyncIterator[pb.WatchResponse]:
        """Events as they come."""
        try:
            record = find_job(self._store, request.job_id)
            async for numbered in self._manager.watch(record.job_id, after=request.after):
                yield pb.WatchResponse(
                    number=numbered.number,
                    at_s=numbered.at_s,
                    kind=numbered.event.kind,
                    json=event_json(numbered.event),
                )
        except PlutinoError as error:
            await abort_with_aio(context, error)

    async def Cancel(self, request: pb.CancelRequest, context: Context) -> pb.CancelResponse:
        """End a job."""
        try:
            record = await self._manager.cancel(find_job(self._store, request.job_id).job_id)
        except PlutinoError as error:
            await abort_with_aio(context, error)
        return pb.CancelResponse(state=record.state.value)

    async def Pause(self, request: pb.PauseRequest, context: Context) -> pb.PauseResponse:
        """Hold a job between two steps."""
        try:
            record = await self._manager.pause(find_job(self._store, request.job_id).job_id)
        except PlutinoError as error:
            await abort_with_aio(context, error)
        return pb.PauseResponse(state=record.state.value)

    async def Resume(self, request: pb.ResumeRequest, context: Context) -> pb.ResumeResponse:
        """Let a held job go on."""
        try:
            record = await self._manager.resume(find_job(self._store, request.job_id).job_id)
        except PlutinoError as error:
            await abort_with_aio(context, error)
        return pb.ResumeResponse(state=record.state.value)

    async def Devices(self, request: pb.DevicesRequest, context: Context) -> pb.DevicesResponse:
        """All devices that ever attached, with what they give and hold."""
        held: dict[str, int] = {}
        for row in self._store.reservations():
            held[row.agent_id] = held.get(row.agent_id, 0) + row.bytes
        links = self._manager.links_of()
        measured = self._link_map.rows()
        devices = [
            {
                "agent_id": agent_id,
                "name": member.device.name,
                "state": member.state.value,
                "reason": member.reason,
                "host_id": member.device.host_id,
                "threads": member.device.threads,
                "memory_budget_bytes": member.device.memory_budget_bytes,
                "baseline_bytes": member.device.baseline_bytes,
                "reserved_bytes": held.get(agent_id, 0),
                "dtypes": list(member.device.dtypes),
                "hardware": asdict(member.device.hardware),
                "versions": dict(member.device.versions),
                "agent_rss_bytes": 0 if (link := self._fleet.link(agent_id)) is None else link.agent_rss_bytes,
                "links": links.get(agent_id, []),
                "measured_links": [row for row in measured if agent_id in row["agent_ids"]],
            }
            for agent_id, member in sorted(self._fleet.fleet.members.items())
        ]
        if self._members is not None:
            with_members(devices, await asyncio.to_thread(self._members))
        return pb.DevicesResponse(devices_json=json.dumps(devices))

    async def CheckLinks(self, request: pb.CheckLinksRequest, context: Context) -> pb.CheckLinksResponse:
        """Every device dials every other one."""
        dials = await check_links(self._fleet, has_tls=caller_of(context.auth_context()) is not None)
        return pb.CheckLinksResponse(dials=[dial_to_proto(dial) for dial in dials])


def with_members(devices: list[dict[str, Any]], members: Sequence[MemberRecord]) -> None:
    """Add to the devices what is known of them as members, and the members that are not attached.

    Revoked ones that are not attached are left out: they are history, and the audit tells it.
    """
    by_id = {device["agent_id"]: device for device in devices}
    for member in members:
        device = by_id.get(member.node_id)
        if device is None:
            if member.revoked_at_s is not None:
                continue
            absent = Device(
                agent_id=AgentId(member.node_id),
                name=member.name,
                host_id="",
                memory_budget_bytes=0,
                baseline_bytes=0,
                threads=0,
                dtypes=(),
            )
            device = {
                **asdict(absent),
                "state": "away",
                "reason": "has joined, and has not attached since the coordinator started",
                "reserved_bytes": 0,
                "agent_rss_bytes": 0,
                "links": [],
                "measured_links": [],
            }
            devices.append(device)
        if member.revoked_at_s is not None:
            device["state"] = "revoked"
        device["joined_at_s"] = member.joined_at_s
        device["certified_at_s"] = member.renewed_at_s


def _spec(text: str) -> JobSpec:
    """The spec that a client sent; its paths are absolute already.

    Raises:
        ConfigError: it is not JSON, or not a job spec.
    """
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"the job spec is not JSON ({error}); send it with plutino's client") from error
    if not isinstance(values, dict):
        raise ConfigError(f"the job spec must be a mapping, not {type(values).__name__}")
    return parse_spec(values, base_dir=Path("/"))


def _summary(record: JobRecord) -> pb.JobSummary:
    return pb.JobSummary(
        job_id=record.job_id,
        name=record.name,
        state=record.state.value,
        reason=record.reason,
        step=record.next_step,
        total_steps=record.total_steps,
        submitted_at_s=record.submitted_at_s,
        ended_at_s=record.ended_at_s or 0.0,
        adapter_dir=record.adapter_dir or "",
    )


def _detail(store: Store, record: JobRecord) -> dict[str, Any]:
    job_id = record.job_id
    scores = store.scores(job_id)
    num_examples = (json.loads(record.spec_json).get("scoring") or {}).get("few_shot", 0)
    return {
        "spec": json.loads(record.spec_json),
        "plan": None if record.plan_json is None else json.loads(record.plan_json),
        "plan_epoch": record.plan_epoch,
        "numerics": None if record.numerics_json is None else json.loads(record.numerics_json),
        "recoveries": record.recoveries,
        "best_step": record.best_step,
        "best_eval_loss": record.best_eval_loss,
        "ledger": [
            {
                "step": row.step,
                "plan_epoch": row.plan_epoch,
                "status": row.status.value,
                "loss": row.loss,
                "grad_norm": row.grad_norm,
                "lr": row.lr,
                "samples": list(row.sample_indices),
                "reason": row.reason,
            }
            for row in store.ledger(job_id)
        ],
        "evaluations": [{"step": row.step, "loss": row.loss} for row in store.evaluations(job_id)],
        "scores": {m: json.loads(text) for m, text in scores.items() if m in ("before", "after")},
        "ability": ability_json(ability_of(scores, num_examples)),
        "transitions": [
            {
                "at_s": row.at_s,
                "event": row.event,
                "from": row.from_state.value,
                "to": row.to_state.value,
                "plan_epoch": row.plan_epoch,
                "reason": row.reason,
            }
            for row in store.transitions(job_id)
        ],
    }
