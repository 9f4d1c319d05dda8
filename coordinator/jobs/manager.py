"""All jobs of a coordinator: takes them in, drives those that live, answers what people ask."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from coordinator.artifacts.publish import check_output_dir
from coordinator.artifacts.shadows import ShadowStore
from coordinator.artifacts.traces import TraceStore
from coordinator.crash_points import crash_point
from coordinator.fleet.link_map import LinkMap
from coordinator.fleet.membership import Change
from coordinator.fleet.registry import FleetRegistry, WorkerExit
from coordinator.jobs.context import JobContext, TrialTerms, state_event
from coordinator.jobs.driver import JobDriver
from coordinator.jobs.endpoints import Endpoints
from coordinator.jobs.interrupts import CancelWish, Interrupt, PauseWish, ResumeWish
from coordinator.jobs.job_ids import new_job_id
from coordinator.jobs.method_choice import is_open
from coordinator.jobs.planning import read_model
from coordinator.jobs.preview import Preview
from coordinator.jobs.profiler import Profiler
from coordinator.jobs.record import JobRecord, JobState
from coordinator.jobs.runner_link import RunnerLink
from coordinator.jobs.shadow_recording import record_shadow
from coordinator.jobs.worker_link import JobWorkers
from coordinator.jobs.worker_view import links_of_job, usage_of_job
from coordinator.scheduling.engine import Engine
from coordinator.scheduling.problem import PlanningProblem
from coordinator.scheduling.queue import PlanningQueue
from coordinator.storage.base import NumberedEvent, Store
from coordinator.weights.hub_models import pin_model
from partitioner.plan import Plan
from plutino.errors import ConfigError, DataError, InvalidTransitionError, PlutinoError
from plutino.events import Notice
from plutino.job.spec import JobSpec
from plutino.types import AgentId, JobId, WorkerRef
from protos import workers_pb2 as pb

logger = logging.getLogger(__name__)

_USAGE_EVERY_S = 2.0
_EVENTS_AT_ONCE = 500
_CANCEL_TIMEOUT_S = 5.0
_WISH_TIMEOUT_S = 5.0


class JobManager:
    """Jobs by id; everything else about them is in the store."""

    def __init__(
        self,
        *,
        store: Store,
        fleet: FleetRegistry,
        link_map: LinkMap,
        engine: Engine,
        endpoints: Endpoints,
        incarnation: int,
        state_dir: Path,
    ) -> None:
        self._store = store
        self._fleet = fleet
        self._link_map = link_map
        self._engine = engine
        self._endpoints = endpoints
        self._incarnation = incarnation
        self._state_dir = state_dir
        self._shadow_files = ShadowStore(state_dir)
        self.traces = TraceStore(state_dir)
        self._profiler = Profiler(fleet)
        self.queue = PlanningQueue(store=store, fleet=fleet, engine=engine)
        self._drivers: dict[JobId, JobDriver] = {}
        self._tasks: dict[JobId, asyncio.Task[None]] = {}
        self._preview = Preview(fleet=fleet, engine=engine, profiler=self._profiler, link_map=link_map)
        self._news: dict[JobId, asyncio.Event] = {}
        self._background: set[asyncio.Task[None]] = set()

    # ---- life ----

    def resume_all(self, trials: Mapping[JobId, TrialTerms]) -> None:
        """Drive every stored job that has not ended, from where it is; ``trials``: what those share that are trials."""
        for record in self._store.jobs():
            if not record.is_terminal:
                logger.info("job %s goes on: %s", record.job_id, record.state.value)
                trial = trials.get(record.job_id)
                if trial is not None:
                    self._recall_plan(record, trial)
                self._drive(record, trial)
                self._expect_devices(record)

    async def run(self) -> None:
        """Run forever: the queue, and usage for watchers."""
        await asyncio.gather(self.queue.run(), self._tell_usage())

    async def close(self) -> None:
        """Stop driving; jobs stay as they are stored."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    # ---- what people ask ----

    async def submit(self, spec: JobSpec, *, idempotency_key: str, trial: TrialTerms | None = None) -> JobRecord:
        """Store a job and begin to drive it; ``trial`` is what it shares with others of its sweep.

        Raises:
            ModelError: the base model cannot be used.
            ConfigError: the output folder holds something else, or a trial's method is open.
            InfeasiblePlanError: its method is open, and none fits the devices that are in.
        """
        if idempotency_key and (known := self._store.submitted_as(idempotency_key)) is not None:
            return known
        if is_open(spec) and trial is not None:
            raise ConfigError(
                "method: auto chooses for one job; name a method in the file, and sweep: --set method=lora,adapters"
            )
        spec = await self._with_pinned_model(spec)
        await asyncio.to_thread(read_model, spec)
        for path in (path for source in spec.data.sources for path in (source.train, source.eval)):
            if path is not None and not Path(path).exists():
                raise DataError(f"there is no file {path}; correct data.train or data.eval")
        if spec.output.dir is not None:
            check_output_dir(Path(spec.output.dir), "")
        chosen: list[Notice] = []
        if is_open(spec):
            spec, _, _ = await self._preview.choose(spec)
            assert spec.auto_method is not None, "it says what was chosen"
            chosen.append(Notice(level="info", text=f"method: auto takes {spec.auto_method.why}"))
        record = JobRecord(
            job_id=JobId(new_job_id(spec.name)),
            name=spec.name,
            spec_json=spec.model_dump_json(),
            submitted_at_s=time.time(),
        )
        stored = await asyncio.wrap_future(
            self._store.submit(record, idempotency_key=idempotency_key or None, events=[state_event(record), *chosen])
        )
        crash_point("job_stored")
        if stored.job_id == record.job_id:
            self._drive(stored, trial)
        return stored

    async def ended(self, job_id: JobId) -> JobRecord:
        """Wait until a job has ended, and its devices and runner are free; gives its record.

        Raises:
            UnknownJobError: no job has this id.
        """
        self._store.job(job_id)
        while (task := self._tasks.get(job_id)) is not None:
            await asyncio.wait({task})
            await asyncio.sleep(0)  # its own callbacks take it out
        return self._store.job(job_id)

    async def plan(self, spec: JobSpec, *, must_fit: bool = True) -> tuple[PlanningProblem, Plan | str]:
        """The plan that a job would get now if it were alone; as :meth:`Preview.plan`."""
        return await self._preview.plan(await self._with_pinned_model(spec), must_fit=must_fit)

    async def cancel(self, job_id: JobId) -> JobRecord:
        """End a job and free everything it holds.

        Raises:
            UnknownJobError: no job has this id.
            InvalidTransitionError: it has ended already.
        """
        record = self._store.job(job_id)
        driver = self._drivers.get(job_id)
        if driver is None or record.is_terminal:
            raise InvalidTransitionError(f"job {job_id} has ended already: {record.state.value}")
        driver.interrupt(CancelWish())
        task = self._tasks[job_id]
        await asyncio.wait({task}, timeout=_CANCEL_TIMEOUT_S)
        return self._store.job(job_id)

    async def pause(self, job_id: JobId) -> JobRecord:
        """Let a running job hold between two steps.

        Raises:
            InvalidTransitionError: the job is not running.
        """
        return await self._wish(job_id, PauseWish(), JobState.PAUSED, from_states=(JobState.RUNNING,))

    async def resume(self, job_id: JobId) -> JobRecord:
        """Let a paused job go on.

        Raises:
            InvalidTransitionError: the job is not paused.
        """
        return await self._wish(job_id, ResumeWish(), JobState.RUNNING, from_states=(JobState.PAUSED,))

    async def _with_pinned_model(self, spec: JobSpec) -> JobSpec:
        """The spec with a hub model's revision replaced by the commit that it is now."""
        pinned = await asyncio.to_thread(pin_model, spec.model)
        return spec.model_copy(update={"model": pinned})

    async def _wish(
        self, job_id: JobId, wish: Interrupt, wanted: JobState, *, from_states: tuple[JobState, ...]
    ) -> JobRecord:
        record = self._store.job(job_id)
        driver = self._drivers.get(job_id)
        if driver is None or record.state not in from_states:
            allowed = " or ".join(state.value for state in from_states)
            raise InvalidTransitionError(f"job {job_id} is {record.state.value}; this needs a job that is {allowed}")
        driver.interrupt(wish)
        deadline_s = time.monotonic() + _WISH_TIMEOUT_S
        while (record := self._store.job(job_id)).state is not wanted and time.monotonic() < deadline_s:
            await asyncio.sleep(0.02)
        return record

    async def watch(self, job_id: JobId, *, after: int) -> AsyncIterator[NumberedEvent]:
        """Events of a job with a larger number, as they come, until the job has ended.

        Raises:
            UnknownJobError: no job has this id.
        """
        self._store.job(job_id)
        news = self._news.setdefault(job_id, asyncio.Event())
        while True:
            news.clear()
            is_over = self._store.job(job_id).is_terminal and job_id not in self._drivers
            found = self._store.events(job_id, after=after, limit=_EVENTS_AT_ONCE)
            for numbered in found:
                yield numbered
                after = numbered.number
            if is_over and not found:
                return
            if not found:
                await _wait_a_moment(news)

    # ---- what the wire brings ----

    def workers_of(self, job_id: JobId) -> JobWorkers | None:
        """The workers of a live job."""
        driver = self._drivers.get(job_id)
        return None if driver is None else driver.context.workers

    def owner_of(self, ref: WorkerRef) -> AgentId | None:
        """The device that a worker of a live job's present plan runs on."""
        driver = self._drivers.get(ref.job_id)
        if driver is None or driver.context.record.plan_json is None:
            return None
        return driver.context.refs().get(ref)

    def links_of(self) -> dict[AgentId, list[dict[str, Any]]]:
        """What every device's workers are connected to, for people."""
        links: dict[AgentId, list[dict[str, Any]]] = {}
        for driver in self._drivers.values():
            for agent_id, shown in links_of_job(driver.context):
                links.setdefault(agent_id, []).append(shown)
        return links

    def runner_of(self, job_id: JobId) -> RunnerLink | None:
        """The runner of a live job, or of one that is only planned."""
        driver = self._drivers.get(job_id)
        return self._preview.runner_of(job_id) if driver is None else driver.context.runner

    def on_worker_exit(self, exit_: WorkerExit) -> None:
        """A device says that a worker has ended."""
        driver = self._drivers.get(exit_.ref.job_id)
        if driver is not None:
            driver.worker_exited(exit_)

    def on_fleet_change(self, change: Change) -> None:
        """A device joined, fell silent, left or is gone."""
        self.queue.kick()
        if change.after.is_away:
            for driver in self._drivers.values():
                driver.device_gone(change.agent_id, change.reason)

    # ---- inside ----

    def _drive(self, record: JobRecord, trial: TrialTerms | None = None) -> None:
        job_id = record.job_id
        context = self._context(record, trial)
        driver = JobDriver(
            context,
            queue=self.queue,
            profiler=self._profiler,
            link_map=self._link_map,
            default_dir=self._state_dir / "adapters" / job_id,
            stop_runner=self._engine.stop_runner,
        )
        self._drivers[job_id] = driver
        self._tasks[job_id] = asyncio.create_task(self._run_driver(driver), name=f"job {job_id}")

    def _recall_plan(self, record: JobRecord, trial: TrialTerms) -> None:
        """The next trials shall get this one's plan: measuring anew needs the memory of the stages that it leaves."""
        planned = self.traces.planned(record.job_id, record.plan_epoch)
        if record.plan_epoch == 1 and record.plan_json is not None and planned is not None:
            trial.problem, trial.plan = planned.problem, planned.plan

    def _expect_devices(self, record: JobRecord) -> None:
        if record.plan_json is None:
            return
        for stage in Plan.model_validate_json(record.plan_json).stages:
            for agent_id, name in zip(stage.agent_ids, stage.device_names, strict=True):
                self._fleet.expect(AgentId(agent_id), name)

    def _context(self, record: JobRecord, trial: TrialTerms | None) -> JobContext:
        job_id = record.job_id

        def on_shadow(ref: WorkerRef, stored: pb.ShadowStored) -> None:
            task = asyncio.get_running_loop().create_task(self._record_shadow(job_id, ref, stored))
            self._background.add(task)
            task.add_done_callback(self._background.discard)

        def on_trouble(ref: WorkerRef, error: str, reason: str) -> None:
            self._drivers[job_id].worker_in_trouble(ref, error, reason)

        def on_trace(ref: WorkerRef, message: pb.StepTrace) -> None:
            self._drivers[job_id].context.take_trace(ref, message)

        return JobContext(
            record,
            store=self._store,
            fleet=self._fleet,
            workers=JobWorkers(
                incarnation=self._incarnation, on_shadow=on_shadow, on_trouble=on_trouble, on_trace=on_trace
            ),
            runner=RunnerLink(record.spec_json, lambda: self._engine.start_runner(job_id)),
            shadow_files=self._shadow_files,
            traces=self.traces,
            coordinator_address=self._endpoints.devices_address,
            bulk_address=self._endpoints.bulk_address,
            on_events=self._wake_watchers,
            trial=trial,
        )

    async def _run_driver(self, driver: JobDriver) -> None:
        job_id = driver.context.job_id
        try:
            await driver.run()
        except Exception:
            logger.exception("driving job %s failed; it stays as it is stored", job_id)
            raise
        finally:
            self._drivers.pop(job_id, None)
            self._tasks.pop(job_id, None)
            self._wake_watchers(job_id)

    async def _record_shadow(self, job_id: JobId, ref: WorkerRef, stored: pb.ShadowStored) -> None:
        driver = self._drivers.get(job_id)
        if driver is None:
            return
        try:
            await record_shadow(driver.context, ref, stored)
        except PlutinoError as error:
            logger.info("shadow %s of job %s is not used: %s", stored.shadow_id, job_id, error)

    def _wake_watchers(self, job_id: JobId) -> None:
        news = self._news.get(job_id)
        if news is not None:
            news.set()

    async def _tell_usage(self) -> None:
        while True:
            await asyncio.sleep(_USAGE_EVERY_S)
            for driver in list(self._drivers.values()):
                usage = usage_of_job(driver.context)
                if usage.workers:
                    await driver.context.tell(usage)


async def _wait_a_moment(news: asyncio.Event) -> None:
    """Wait for news, but look again now and then: the job may end without any."""
    try:
        await asyncio.wait_for(news.wait(), 1.0)
    except asyncio.TimeoutError:
        return
