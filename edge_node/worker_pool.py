"""The worker processes of one device: the spare, those that work for jobs, and their memory.

A spare is a worker whose imports are done and which waits for a job. It gives the device's measured baseline, runs
profiles, and becomes the next job's worker at once. A worker whose job ended well may stay with its stage loaded, for
the next job of the same stage key; it gives way to whatever else needs memory. Every change is reported as an
:class:`AgentEvent`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable

from edge_node.guard import read_usage
from edge_node.pool_config import PoolConfig, Readiness
from edge_node.pool_profiles import PoolProfiles
from edge_node.pool_reports import PoolReports, worker_id
from edge_node.pooled_worker import (
    PooledWorker,
    job_key,
    process_for,
    promised_bytes,
    read_assignment,
    refuse_too_large,
    spare_of,
    worker_of,
)
from edge_node.state_dir import StateDir, log_tail, rotate_log
from edge_node.supervision import (
    NOT_STARTED_EXIT_CODE,
    Ending,
    Exiting,
    describe_end,
    over_budget,
    spare_is_due,
)
from edge_node.worker_process import Event, WorkerProcess
from plutino.errors import AgentError, ConfigError
from plutino.sizes import format_size
from plutino.types import WorkerRef
from protos import agents_pb2

logger = logging.getLogger(__name__)

_WATCH_EVERY_S = 0.5
"""Longest time between two readings of the workers' memory."""

_REAP_S = 10.0
_LAST_SPARE_BACKOFF_S = 60.0


class WorkerPool:
    """Starts, watches and ends workers. Use it on one event loop."""

    def __init__(
        self,
        config: PoolConfig,
        state_dir: StateDir,
        report: Callable[[agents_pb2.AgentEvent], None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Nothing is started before :meth:`warm_up`."""
        self._config = config
        self._state_dir = state_dir
        self._reports = PoolReports(report)
        self._profiles = PoolProfiles(config, state_dir, self._reports, lambda: self.readiness)
        self._clock = clock
        self._workers: dict[PooledWorker, asyncio.Task[None]] = {}
        self._jobs_run: set[str] = set()
        self._readiness: Readiness | None = None
        self._changed = asyncio.Event()
        self._crash: BaseException | None = None
        self._last_start_s = clock()
        self._spare_failures = 0
        self._spare_not_before_s = clock()

    @property
    def readiness(self) -> Readiness:
        """What the first worker told; :meth:`warm_up` must have returned."""
        assert self._readiness is not None
        return self._readiness

    def running(self) -> list[WorkerRef]:
        """The workers that work for jobs, sorted."""
        return sorted(worker.ref for worker in self._workers if worker.ref is not None)

    def has_run(self, job_id: str) -> bool:
        """Whether a worker of the job runs here or has run since the agent's start; from any thread."""
        return job_id in self._jobs_run

    def usages(self) -> list[agents_pb2.Heartbeat.WorkerUsage]:
        """What every worker of a job uses now."""
        found = []
        for worker in self._workers:
            usage = read_usage(worker.process.pid) if worker.ref is not None else None
            if usage is not None and worker.ref is not None:
                found.append(
                    agents_pb2.Heartbeat.WorkerUsage(
                        worker=worker_id(worker.ref),
                        rss_bytes=usage.rss_bytes,
                        peak_rss_bytes=usage.peak_rss_bytes,
                        cpu_seconds=usage.cpu_seconds,
                    )
                )
        return found

    async def warm_up(self) -> None:
        """Start the first spare and wait for what it tells of the device.

        Raises:
            AgentError: no worker can start here.
            ConfigError: the memory budget is less than a worker needs before any job.
        """
        worker = await self._start_process()
        deadline_s = self._clock() + self._config.ready_timeout_s
        while self._readiness is None and worker in self._workers and self._clock() < deadline_s:
            await self._wait_for_change(deadline_s - self._clock())
        if self._readiness is None:
            what = (
                worker.end_reason or f"was not ready after {self._config.ready_timeout_s:.0f} s; log {worker.log_path}"
            )
            raise AgentError(f"no worker can start on this device; check its installation. The first one: {what}")
        baseline_bytes = self._readiness.baseline_bytes
        if baseline_bytes > self._config.memory_budget_bytes:
            raise ConfigError(
                f"a worker holds {format_size(baseline_bytes)} before any job, the device offers "
                f"{format_size(self._config.memory_budget_bytes)}; raise --memory"
            )

    async def watch(self) -> None:
        """Hold workers to their budgets, rotate their logs and keep a spare, until cancelled."""
        while True:
            await self._wait_for_change(_WATCH_EVERY_S)
            for worker in list(self._workers):
                self._enforce_budget(worker)
                if worker.held_key and self._clock() >= worker.held_until_s:
                    self._begin_stop(worker, "nothing came for what it held")
                rotate_log(worker.log_path)
            await self._keep_spare()

    async def start(self, ref: WorkerRef, assignment_json: str) -> None:
        """Start a job's worker; one that runs is left alone. Workers of older plan epochs of its job are ended first.

        The outcome is reported: WorkerStarted, or WorkerExited with the reason why not.
        """
        worker = worker_of(ref, self._workers)
        if worker is not None and not worker.is_ending:
            self._reports.started(ref, worker.process.pid)
            return
        try:
            asked = read_assignment(assignment_json)
            self._refuse_stale(ref)
            holder = process_for(asked, ref.job_id, self._workers)
            await self._clear_for(ref, holder)
            refuse_too_large(asked.budget_bytes, holder, self._workers, self._config.memory_budget_bytes)
            worker = holder or spare_of(self._workers) or await self._start_process()
        except (ConfigError, AgentError, OSError) as error:
            self._reports.exited(ref, NOT_STARTED_EXIT_CODE, f"not started: {error}", out_of_memory=False)
            return
        worker.ref, worker.budget_bytes, worker.held_key = ref, asked.budget_bytes, ""
        self._jobs_run.add(ref.job_id)
        self._last_start_s = self._clock()
        worker.process.send(
            {
                "assign": json.loads(assignment_json),
                "network": self._config.network.to_json(),
                "weights": self._config.weights.to_json(),
            }
        )
        self._reports.started(ref, worker.process.pid)

    def stop(self, ref: WorkerRef, reason: str) -> None:
        """Begin to end a job's worker; its exit is reported, at once if it is gone already."""
        worker = worker_of(ref, self._workers)
        if worker is None:
            self._reports.exited(ref, 0, "was not running", out_of_memory=False)
        else:
            self._begin_stop(worker, reason)

    async def profile(self, request_id: str, request_json: str, *, only_kept: bool = False) -> None:
        """Report what was kept for such a request, or else let the spare measure; or why there is no answer.

        Args:
            request_id: of the report.
            request_json: what to measure.
            only_kept: report without seconds that nothing is kept, and measure nothing.
        """
        try:
            request = dict(json.loads(request_json))
            if self._profiles.answer_kept(request_id, request):
                return
            if only_kept:
                self._refuse_to_measure()
                self._reports.profile(request_id)
                return
            if (spare := spare_of(self._workers)) is None:
                await self._end_holders(f"memory is needed to measure {request_id}")
                spare = await self._start_spare_for_profile()
        except (ValueError, TypeError, AgentError, OSError) as error:
            self._reports.profile(request_id, error=f"not measured: {error}")
            return
        self._profiles.ask(spare, request_id, request, is_undisturbed=not self.running())

    def go_on(self, request_id: str, milestone: int, *, is_whole: bool) -> None:
        """Tell the worker that measures for a request that it may go on; nobody where it measures no more."""
        for worker in self._workers:
            if worker.profiles and worker.profiles[0].request_id == request_id:
                worker.process.send({"go_on": {"milestone": milestone, "is_whole": is_whole}})

    async def end(self, reason: str) -> None:
        """End all workers; returns when every process is reaped."""
        following = set(self._workers.values())
        for worker in list(self._workers):
            self._begin_stop(worker, reason)
        if following:
            await asyncio.wait(following)

    # Private: processes.

    async def _start_process(self, *, yields: bool = False) -> PooledWorker:
        log_path = self._state_dir.new_log(in_use={worker.log_path for worker in self._workers})
        command = self._config.worker_command
        if self._config.device != "cpu":
            command = (*command, "--device", self._config.device)
        if yields:
            command = (*command, "--yields")
        process = await WorkerProcess.start(command, self._config.threads, log_path)
        worker = PooledWorker(process=process, log_path=log_path)
        following = asyncio.create_task(self._follow(worker))
        self._workers[worker] = following
        following.add_done_callback(self._note_crash)
        return worker

    async def _follow(self, worker: PooledWorker) -> None:
        exit_code = await worker.process.wait(lambda event: self._on_event(worker, event))
        del self._workers[worker]
        if worker.process.violation is not None:
            worker.exiting = Exiting(reason=worker.process.violation, out_of_memory=False, error="WireError")
        reason, is_out_of_memory = describe_end(
            Ending(
                exit_code=exit_code,
                over_budget=worker.over_budget,
                stop_reason=worker.stop_reason,
                exiting=worker.exiting,
                log_tail=log_tail(worker.log_path),
                log_path=str(worker.log_path),
            )
        )
        worker.end_reason = reason
        for asked in worker.profiles:
            self._reports.profile(asked.request_id, error=reason)
        if worker.ref is not None:
            self._reports.exited(worker.ref, exit_code, reason, out_of_memory=is_out_of_memory)
        elif worker.stop_reason is None:
            self._on_spare_lost(reason)
        self._changed.set()

    def _on_event(self, worker: PooledWorker, event: Event) -> None:
        match event:
            case {"ready": dict(told)}:
                self._spare_failures = 0
                self._readiness = self._readiness or Readiness.from_values(told)
                self._changed.set()
            case {"reached": int(milestone)} if worker.profiles:
                self._reports.profile_reached(worker.profiles[0].request_id, milestone)
            case {"profile": dict(result)} if worker.profiles:
                self._profiles.take(worker.profiles.popleft(), result, is_undisturbed=not self.running())
            case {
                "idle": {"stage_key": str(key), "keeps_stage_s": (int() | float()) as keeps_s, "reason": str(reason)}
            }:
                self._hold(worker, key, keeps_s, f"{reason}; it holds its stage for {keeps_s:.0f} s")
            case {
                "going_on": {"waits_s": (int() | float()) as waits_s, "left_bytes": int(left), "reason": str(reason)}
            } if worker.ref is not None:
                worker.left_bytes = left
                text = f"{reason}; its process waits {waits_s:.0f} s for the job's next plan"
                self._hold(worker, job_key(worker.ref.job_id), waits_s, text)
            case {"exiting": dict(said)}:
                worker.exiting = Exiting(
                    reason=str(said["reason"]),
                    out_of_memory=bool(said["out_of_memory"]),
                    error=str(said["error"] or ""),
                )
            case _:
                raise ValueError(f"unexpected event {str(event)[:200]}")

    def _hold(self, worker: PooledWorker, key: str, waits_s: float, reason: str) -> None:
        if worker.ref is None or worker.is_ending:
            return  # it was told to end meanwhile, and its exit is reported then
        ref, worker.ref = worker.ref, None
        worker.held_key, worker.held_until_s = key, self._clock() + waits_s
        self._reports.exited(ref, 0, reason, out_of_memory=False)
        self._changed.set()

    def _on_spare_lost(self, reason: str) -> None:
        self._spare_failures += 1
        backoff_s = min(2.0**self._spare_failures, _LAST_SPARE_BACKOFF_S)
        self._spare_not_before_s = self._clock() + backoff_s
        logger.warning("the spare worker is gone, the next one starts in %.0f s: %s", backoff_s, reason)

    def _note_crash(self, following: asyncio.Task[None]) -> None:
        if not following.cancelled() and following.exception() is not None:
            self._crash = following.exception()
            self._changed.set()

    async def _wait_for_change(self, timeout_s: float) -> None:
        try:
            await asyncio.wait_for(self._changed.wait(), timeout_s)
        except asyncio.TimeoutError:
            return
        self._changed.clear()
        if self._crash is not None:
            raise self._crash

    def _begin_stop(self, worker: PooledWorker, reason: str) -> None:
        if worker.stop_reason is None:
            worker.stop_reason = reason
            worker.process.stop(self._config.stop_grace_s)

    # Private: what gives way to what.

    def _enforce_budget(self, worker: PooledWorker) -> None:
        if self._config.device != "cpu":
            return  # the worker holds itself to its budget on the card, which cannot be seen from here
        usage = read_usage(worker.process.pid)
        if usage is None or worker.over_budget is not None:
            return
        if worker.ref is None and not worker.held_key:
            budget_bytes = self._config.memory_budget_bytes - sum(promised_bytes(self._workers))
            who = "the spare worker"
        else:
            budget_bytes, who = worker.budget_bytes, str(worker.ref or "a worker that holds its stage")
        worker.over_budget = over_budget(usage.rss_bytes, budget_bytes, who)
        if worker.over_budget is not None:
            logger.warning("killed: %s", worker.over_budget)
            worker.process.kill()

    def _refuse_stale(self, ref: WorkerRef) -> None:
        newest = max((known.plan_epoch for known in self.running() if known.job_id == ref.job_id), default=0)
        if newest > ref.plan_epoch:
            raise AgentError(f"{ref} belongs to an older plan; plan epoch {newest} of the job runs here")

    async def _clear_for(self, ref: WorkerRef, holder: PooledWorker | None) -> None:
        """End what the job left of older plan epochs and all held stages but the one that it takes."""
        for worker in list(self._workers):
            if worker.ref is not None and worker.ref.job_id == ref.job_id and worker.ref.plan_epoch < ref.plan_epoch:
                self._begin_stop(worker, f"plan epoch {ref.plan_epoch} replaces it")
        await self._end_holders(f"{ref} needs memory", but=holder)

    async def _end_holders(self, reason: str, *, but: PooledWorker | None = None) -> None:
        """End workers that wait with a stage, and wait for all that is ending: its memory may be needed."""
        for worker in list(self._workers):
            if worker.held_key and worker is not but:
                self._begin_stop(worker, reason)
        ending = {following for worker, following in self._workers.items() if worker.is_ending}
        if ending:
            _, pending = await asyncio.wait(ending, timeout=self._config.stop_grace_s + _REAP_S)
            if pending:
                raise AgentError(f"{len(pending)} earlier workers do not end although they were killed")

    # Private: the spare.

    def _spare_is_due(self, settle_s: float, taken_bytes: list[int]) -> bool:
        return spare_is_due(
            has_spare=spare_of(self._workers) is not None,
            running_budgets_bytes=taken_bytes,
            baseline_bytes=self.readiness.baseline_bytes,
            memory_budget_bytes=self._config.memory_budget_bytes,
            since_last_start_s=self._clock() - self._last_start_s,
            settle_s=settle_s,
        )

    async def _keep_spare(self) -> None:
        if self._clock() >= self._spare_not_before_s and self._spare_is_due(
            self._config.spare_settle_s, promised_bytes(self._workers)
        ):
            try:
                await self._start_process(yields=bool(self.running()))
            except OSError as error:
                self._on_spare_lost(f"it could not be started: {error}")

    async def _start_spare_for_profile(self) -> PooledWorker:
        self._refuse_to_measure()
        return await self._start_process()

    def _refuse_to_measure(self) -> None:
        """Refuse where there is no spare and no room for one beside the workers of jobs; held stages give way.

        Raises:
            AgentError: with the numbers.
        """
        taken_bytes = [worker.budget_bytes for worker in self._workers if worker.ref is not None]
        if spare_of(self._workers) is None and not self._spare_is_due(0.0, taken_bytes):
            raise AgentError(
                f"running workers take {format_size(sum(taken_bytes))} of "
                f"{format_size(self._config.memory_budget_bytes)}, which leaves no room for another one to measure "
                "with; end a job there first"
            )
