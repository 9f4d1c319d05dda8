"""What people see of a live job's workers: their connections, their memory and processor time."""

from __future__ import annotations

from typing import Any

from coordinator.jobs.context import JobContext
from coordinator.jobs.worker_link import WorkerStatus
from plutino.events import Usage, WorkerUsage
from plutino.types import AgentId


def links_of_job(context: JobContext) -> list[tuple[AgentId, dict[str, Any]]]:
    """What each worker of a live job is connected to, with the device that it runs on."""
    if context.record.plan_json is None:
        return []
    shown = []
    for ref, agent_id in context.refs().items():
        status = context.workers.status(ref)
        shown.append(
            (
                agent_id,
                {
                    "job_id": context.job_id,
                    "stage": ref.stage_index,
                    "replica": ref.replica_index,
                    "address": "" if status is None or status.loaded is None else status.loaded.data_address,
                    "state": _link_state(status),
                    "sent_bytes": 0 if status is None or status.vote is None else status.vote.times.sent_bytes,
                },
            )
        )
    return shown


def usage_of_job(context: JobContext) -> Usage:
    """What each worker of a live job uses now."""
    if context.record.plan_json is None or context.record.is_terminal:
        return Usage(workers=())
    rows: list[WorkerUsage] = []
    for ref, agent_id in context.refs().items():
        link = context.fleet.link(agent_id)
        used = None if link is None else link.usage.get(ref)
        if used is not None:
            rows.append(
                WorkerUsage(
                    worker=context.worker_name(ref),
                    rss_bytes=used.rss_bytes,
                    peak_rss_bytes=used.peak_rss_bytes,
                    cpu_s=used.cpu_seconds,
                    predicted_peak_bytes=context.plan.stages[ref.stage_index].peak_bytes,
                )
            )
    return Usage(workers=tuple(rows))


def _link_state(status: WorkerStatus | None) -> str:
    if status is None or not status.is_attached:
        return "not attached"
    return "up" if status.is_linked else "being set up"
