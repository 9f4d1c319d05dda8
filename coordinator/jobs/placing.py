"""Starting and ending a plan's workers: from a stored plan to loaded and linked stages, and back to free memory."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Iterable, Mapping

from coordinator.artifacts.offered_adapters import offer_initial_adapter, offer_reward_adapter
from coordinator.crash_points import crash_point
from coordinator.jobs.context import JobContext
from coordinator.jobs.move_cost import LoadingTimes, StageLoad
from coordinator.jobs.move_times import LOAD
from coordinator.jobs.offering import offer_base
from coordinator.jobs.phases import entry_owners
from coordinator.jobs.prepared import for_devices
from coordinator.jobs.restoring import restore_point
from coordinator.scheduling.problem import first_trainable_stage, stage_shapes
from plutino.errors import AgentError, AgentLostError
from plutino.events import WorkerLoaded, WorkerLoading
from plutino.job.assignment import (
    DeviceCache,
    StoredAdapter,
    StoredRewardAdapter,
    WorkerAssignment,
    stage_key,
)
from plutino.job.spec import JobSpec
from plutino.manifest import Manifest
from plutino.types import AgentId, WorkerRef
from protos import workers_pb2 as pb

logger = logging.getLogger(__name__)

KEEP_TIMEOUT_S = 3.0
"""A worker that shall keep its stage, or go on, has so long to say that it does, before it is ended after all."""
STOP_TIMEOUT_S = 4.0
"""An agent ends a worker within 2 s, by force if it must; the job's end waits this long for its word."""
LOAD_STALLED_S = 600.0
"""Bounds the silence of a loading worker, not the loading: a large model over a slow link takes hours."""
_PROGRESS_EVERY_S = 2.0
LINK_TIMEOUT_S = 60.0


async def ensure_workers(context: JobContext, *, restore_step: int) -> tuple[tuple[str, ...], LoadingTimes]:
    """All workers of the plan run, are loaded and linked.

    Workers that are there already are left alone.

    Returns:
        The union of their parameters' names, and how long it took since the base model was here to be handed out.

    Raises:
        AgentLostError: a worker that had loaded, or its device, is gone.
        AgentError: a device does not finish in time.
    """
    refs = context.refs()
    context.workers.expect(refs)
    manifest = await offer_base(context)
    files = context.shadow_files
    initial = await asyncio.to_thread(offer_initial_adapter, context.spec, context.job_id, files)
    reward = await asyncio.to_thread(offer_reward_adapter, context.spec, context.job_id, files)
    assignments = _assignments(context, await _device_spec(context), restore_step, manifest, initial, reward)
    asked: set[WorkerRef] = set()
    started_s = time.monotonic()
    await _load_all(context, refs, assignments, asked)
    context.end_move_part(LOAD)
    await _link(context)
    total_s = time.monotonic() - started_s
    for status in context.workers.statuses:
        if status.ref in asked and status.loaded is not None:
            await context.tell(_loaded_event(context, status.ref, status.loaded))
    loads = [(s.ref, s.loaded) for s in context.workers.statuses if s.loaded is not None]
    stages = tuple(
        StageLoad(agent_id=refs[ref], seconds=loaded.seconds, bytes_by_place=dict(loaded.bytes_by_place))
        for ref, loaded in loads
    )
    names = tuple(sorted({name for _, loaded in loads for name in loaded.parameter_names}))
    return names, LoadingTimes(total_s=total_s, stages=stages)


async def _load_all(
    context: JobContext,
    refs: Mapping[WorkerRef, AgentId],
    assignments: Mapping[WorkerRef, WorkerAssignment],
    asked: set[WorkerRef],
) -> None:
    told: dict[WorkerRef, int] = {}
    told_at_s = moved_at_s = time.monotonic()
    moved = (0, 0)
    while not _all_loaded(context):
        for ref, agent_id in refs.items():
            _start_if_missing(context, ref, agent_id, assignments[ref], asked)
        await _changed_soon(context)
        now_s = time.monotonic()
        if (state := _loading_state(context)) != moved:
            moved, moved_at_s = state, now_s
        if now_s - moved_at_s > LOAD_STALLED_S:
            late = [str(ref) for ref in refs if not _is_loaded(context, ref)]
            raise AgentError(f"{', '.join(late)} did not get on with loading for {LOAD_STALLED_S:.0f} s")
        if now_s - told_at_s > _PROGRESS_EVERY_S:
            told_at_s = now_s
            await context.tell(*_progress_events(context, told))


def _loading_state(context: JobContext) -> tuple[int, int]:
    """Changes whenever a worker gets on with loading."""
    statuses = context.workers.statuses
    done_bytes = sum(status.progress.done_bytes for status in statuses if status.progress is not None)
    return done_bytes, sum(_is_loaded(context, status.ref) for status in statuses)


def _progress_events(context: JobContext, told: dict[WorkerRef, int]) -> list[WorkerLoading]:
    """News of workers that are still loading, for those that watch."""
    events = []
    for status in context.workers.statuses:
        progress = status.progress
        if status.loaded is None and progress is not None and told.get(status.ref) != progress.done_bytes:
            told[status.ref] = progress.done_bytes
            events.append(
                WorkerLoading(
                    worker=context.worker_name(status.ref),
                    plan_epoch=status.ref.plan_epoch,
                    done_bytes=progress.done_bytes,
                    total_bytes=progress.total_bytes,
                    bytes_by_place=dict(progress.bytes_by_place),
                )
            )
    return events


async def stop_workers(
    context: JobContext, *, before_epoch: int, reason: str, keep_stages: bool = False, go_on: bool = False
) -> None:
    """No worker of the job with a plan epoch below this runs; waits within a bound for the devices' word.

    With ``keep_stages`` the workers may stay, with their stages loaded and without this job; with ``go_on`` their
    processes may, without stages, for the job's next plan.
    """
    context.workers.tell(pb.WorkerCommand(finish=pb.Finish(reason=reason, goes_on=go_on)))
    context.workers.expect(())

    def running() -> list[tuple[AgentId, WorkerRef]]:
        found: list[tuple[AgentId, WorkerRef]] = []
        for device in context.fleet.devices:
            link = context.fleet.link(device.agent_id)
            for ref in () if link is None else link.workers:
                if ref.job_id == context.job_id and ref.plan_epoch < before_epoch:
                    found.append((device.agent_id, ref))
        return found

    async def is_over(within_s: float) -> bool:
        async def wait_until_stopped() -> None:
            while running():
                await asyncio.sleep(0.02)

        try:
            await asyncio.wait_for(wait_until_stopped(), within_s)
        except asyncio.TimeoutError:
            return False
        return True

    # They were told to finish; ended by force, a worker would take its stage or its process with it.
    if (keep_stages or go_on) and await is_over(KEEP_TIMEOUT_S):
        return
    for agent_id, ref in running():
        context.fleet.stop_worker(agent_id, ref, reason)
    if not await is_over(STOP_TIMEOUT_S):
        logger.warning("%s: devices still report %s", context.job_id, running())


def _start_if_missing(
    context: JobContext, ref: WorkerRef, agent_id: AgentId, assignment: WorkerAssignment, asked: set[WorkerRef]
) -> None:
    if context.fleet.is_gone(agent_id):
        raise AgentLostError(f"{context.fleet.name_of(agent_id)} left before its stage was loaded")
    link = context.fleet.link(agent_id)
    if link is None:
        return  # it has until the end of its lease to come back
    if ref not in link.workers and ref not in asked:
        asked.add(ref)
        context.fleet.start_worker(agent_id, ref, assignment.model_dump_json())
        crash_point("workers_started")


async def _changed_soon(context: JobContext) -> None:
    """Wait for news of a worker, but look at the devices again after a moment."""
    try:
        await asyncio.wait_for(context.workers.wait(lambda: _all_loaded(context)), 0.2)
    except asyncio.TimeoutError:
        return


def _is_loaded(context: JobContext, ref: WorkerRef) -> bool:
    status = context.workers.status(ref)
    return status is not None and status.loaded is not None and status.is_attached


def _all_loaded(context: JobContext) -> bool:
    return all(_is_loaded(context, status.ref) for status in context.workers.statuses)


async def _link(context: JobContext) -> None:
    statuses = context.workers.statuses
    if all(status.is_linked for status in statuses):
        return
    owners = context.refs()
    peers = [
        pb.Link.Peer(
            stage_index=status.ref.stage_index,
            replica_index=status.ref.replica_index,
            data_address="" if status.loaded is None else status.loaded.data_address,
            agent_id=owners[status.ref],
        )
        for status in statuses
    ]
    context.workers.tell(pb.WorkerCommand(link=pb.Link(peers=peers)), key="link")
    try:
        are_linked = context.workers.wait(lambda: all(status.is_linked for status in context.workers.statuses))
        await asyncio.wait_for(are_linked, LINK_TIMEOUT_S)
    except asyncio.TimeoutError:
        late = [str(s.ref) for s in context.workers.statuses if not s.is_linked]
        raise AgentError(f"{', '.join(late)} did not reach their neighbours within {LINK_TIMEOUT_S:.0f} s") from None
    finally:
        context.workers.forget("link")


async def _device_spec(context: JobContext) -> JobSpec:
    """The job's spec for devices, with what only the data and the tokenizer tell."""
    spec = context.spec
    lacks_classes = spec.objective.has_score_head and not spec.objective.num_outputs
    return for_devices(spec, await context.runner.prepare()) if spec.method.text or lacks_classes else spec


def _assignments(
    context: JobContext,
    spec: JobSpec,
    restore_step: int,
    manifest: Manifest,
    initial: StoredAdapter | None,
    reward: StoredRewardAdapter | None,
) -> dict[WorkerRef, WorkerAssignment]:
    plan, record = context.plan, context.record
    shapes = stage_shapes(plan)
    restore = restore_point(context, restore_step)
    caches = _caches(context)
    manifest_sha256 = hashlib.sha256(manifest.to_bytes()).hexdigest()
    return {
        ref: WorkerAssignment(
            job_id=context.job_id,
            plan_epoch=record.plan_epoch,
            stage_index=ref.stage_index,
            replica_index=ref.replica_index,
            stages=shapes,
            spec=spec,
            numerics=context.numerics,
            checkpointing=plan.stages[ref.stage_index].checkpointing,
            first_trainable_stage=first_trainable_stage(context.spec, shapes),
            base_hash=manifest.base_hash,
            manifest_sha256=manifest_sha256,
            total_steps=record.total_steps,
            max_micro_batches=plan.num_micro_batches,
            threads=replica.threads,
            memory_budget_bytes=replica.granted_bytes,
            headroom_bytes=replica.granted_bytes - replica.peak_bytes,
            keeps_heap=replica.keeps_heap,
            coordinator_address=context.coordinator_address,
            bulk_address=context.bulk_address,
            initial=initial,
            restore=restore,
            reward_adapter=reward,
            stage_key=""
            if plan.from_cache
            else stage_key(
                manifest.base_hash,
                shapes[ref.stage_index],
                context.numerics,
                checkpointing=plan.stages[ref.stage_index].checkpointing,
                has_lm_head=not spec.objective.has_score_head,
            ),
            keeps_stage_s=context.keeps_stage_s,
            entry_owners=entry_owners(plan),
            from_cache=plan.from_cache,
            caches=tuple(cache for cache in caches if cache.agent_id != agent_id),
        )
        for ref, agent_id in context.refs().items()
        for replica in (plan.stages[ref.stage_index].replicas[ref.replica_index],)
    }


def _caches(context: JobContext) -> list[DeviceCache]:
    """Weights caches of the plan's devices that are attached."""
    found: list[DeviceCache] = []
    for agent_id in dict.fromkeys(context.refs().values()):
        link = context.fleet.link(agent_id)
        if link is not None and link.cache_address:
            name = context.fleet.name_of(agent_id)
            found.append(DeviceCache(agent_id=agent_id, device_name=name, address=link.cache_address))
    return found


def _loaded_event(context: JobContext, ref: WorkerRef, loaded: pb.StageLoaded) -> WorkerLoaded:
    stage = context.plan.stages[ref.stage_index]
    return WorkerLoaded(
        worker=context.worker_name(ref),
        plan_epoch=ref.plan_epoch,
        start_block=stage.start_block,
        end_block=stage.end_block,
        bytes_read=loaded.bytes_read,
        tensors_read=loaded.tensors_read,
        seconds=loaded.seconds,
        rss_bytes=loaded.rss_bytes,
        trainable_parameters=loaded.trainable_parameters,
        bytes_by_place=dict(loaded.bytes_by_place),
    )


def present_workers(context: JobContext, refs: Iterable[WorkerRef]) -> set[WorkerRef]:
    """Workers whose memory still exists, as far as their devices have said or may still say."""
    owners = context.refs()
    present: set[WorkerRef] = set()
    for ref in refs:
        agent_id = owners[ref]
        link = context.fleet.link(agent_id)
        if not context.fleet.is_gone(agent_id) and (link is None or ref in link.workers):
            present.add(ref)
    return present
