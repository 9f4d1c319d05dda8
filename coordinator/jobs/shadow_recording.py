"""Shadows that workers have stored, written down; those that nobody will need, removed."""

from __future__ import annotations

import asyncio

from coordinator.crash_points import crash_point
from coordinator.jobs.context import JobContext
from coordinator.jobs.recovery import Shadow, obsolete_shadows
from plutino.events import ShadowDurable
from plutino.types import WorkerRef
from protos import workers_pb2 as pb


async def record_shadow(context: JobContext, ref: WorkerRef, stored: pb.ShadowStored) -> None:
    """Write down a verified shadow, tell of the step if it became durable, and drop what nobody will need."""
    async with context.shadow_lock:  # one after the other: each must see whether it completed a step
        await _record_shadow(context, ref, stored)


async def _record_shadow(context: JobContext, ref: WorkerRef, stored: pb.ShadowStored) -> None:
    before = context.durable()
    shadow = Shadow(
        shadow_id=stored.shadow_id,
        step=stored.step,
        plan_epoch=ref.plan_epoch,
        sha256=stored.sha256,
        bytes=stored.bytes,
        parameter_names=tuple(stored.parameter_names),
    )
    await asyncio.wrap_future(context.store.add_shadow(context.job_id, shadow))
    crash_point("shadow_recorded")
    context.slowest_upload_s = max(context.slowest_upload_s or 0.0, stored.seconds)
    after = context.durable()
    for step in sorted(after.keys() - before.keys()):
        shadows = after[step]
        await context.tell(ShadowDurable(step=step, bytes=sum(s.bytes for s in shadows), num_shadows=len(shadows)))
    await _drop_obsolete(context)
    await context.workers.wake()


async def _drop_obsolete(context: JobContext) -> None:
    record = context.record
    pinned = {record.start_step} | ({record.best_step} if record.best_step is not None else set())
    obsolete = obsolete_shadows(
        context.store.shadows(context.job_id), frozenset(record.parameter_names), pinned_steps=frozenset(pinned)
    )
    if obsolete:
        ids = [shadow.shadow_id for shadow in obsolete]
        await asyncio.wrap_future(context.store.remove_shadows(context.job_id, ids))
        await asyncio.to_thread(context.shadow_files.delete, context.job_id, ids)
