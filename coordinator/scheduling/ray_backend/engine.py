"""The engine on Ray: rounds of scheduling and jobs' runners are actors in processes of their own.

Nothing here is true, so every loss is mended by starting again: Ray restarts an actor whose process died and repeats
its call; if Ray itself breaks, a fresh one is started, with a runner for every job that had one.
Nothing here blocks the event loop, and Ray's daemons hang on one thread that lives as long as they do.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coordinator.scheduling.ray_backend.actors import RunnerActor, SchedulerActor
from coordinator.scheduling.ray_backend.cluster import Cluster, EmbeddedCluster, JoinedCluster
from coordinator.scheduling.round import solve
from plutino.types import JobId

logger = logging.getLogger(__name__)

SOLVE_WITHIN_S = 60.0
"""Beyond this a round is given up."""

_LOOK_EVERY_S = 1.0
_RECORD_EVERY = 10
"""Looks at the daemons between two updates of the record, which list all processes of the machine."""
_START_AGAIN_AFTER_S = 5.0
_STOP_RUNNER_WITHIN_S = 10.0
"""A runner ends when its stream does, unless it is at work; then it is killed."""
_STOP_CLUSTER_WITHIN_S = 20.0
"""It takes 1.5 s, and 7 s if the gcs_server is dead."""


class RoundLostError(Exception):
    """A round of scheduling got no answer. Nothing was decided, and it may be asked again."""


@dataclass(slots=True)
class _Runner:
    task: asyncio.Task[None]
    is_asked_for_again: bool = False
    """Somebody missed it while its last call was ending."""


class RayEngine:
    """Implements :class:`coordinator.scheduling.engine.Engine`.

    Args:
        address: where runners reach the coordinator.
        bulk_address: where runners reach the bulk process.
        incarnation: of the coordinator; fences runners of earlier ones.
        state_dir: the coordinator's; the embedded Ray keeps its token and its record of processes in ``ray`` below it.
        ray_address: of an existing cluster to join; None starts an embedded one.
        runner_identity: the identity file of runners; None without TLS.
    """

    def __init__(
        self,
        *,
        address: str,
        bulk_address: str,
        incarnation: int,
        state_dir: Path,
        ray_address: str | None = None,
        runner_identity: Path | None = None,
    ) -> None:
        self._runner_identity = None if runner_identity is None else str(runner_identity)
        self._address = address
        self._bulk_address = bulk_address
        self._incarnation = incarnation
        self._cluster: Cluster = EmbeddedCluster(state_dir) if ray_address is None else JoinedCluster(ray_address)
        self._daemons_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ray-daemons")
        self._ready = asyncio.Event()
        self._supervisor: asyncio.Task[None] | None = None
        self._scheduler: Any = None
        self.is_scheduler_up = False
        """Its process has started; until then rounds are solved in this one."""
        self._coming_up: asyncio.Task[None] | None = None
        self._scheduler_numbers = itertools.count(1)
        self._rounds: set[asyncio.Task[str]] = set()
        self._runners: dict[JobId, _Runner] = {}
        self._stopping: set[asyncio.Task[None]] = set()
        self._is_closed = False

    async def start(self) -> None:
        """Start or join Ray; a few seconds.

        Raises:
            PlutinoError: see :class:`~coordinator.scheduling.ray_backend.cluster.EmbeddedCluster` and
                :class:`~coordinator.scheduling.ray_backend.cluster.JoinedCluster`.
        """
        try:
            await self._start_cluster()
        except BaseException:
            await self.close()
            raise
        self._supervisor = asyncio.create_task(self._supervise())

    async def solve(self, round_json: str) -> str:
        """See :class:`coordinator.scheduling.engine.Engine`.

        Raises:
            RoundLostError: no answer within SOLVE_WITHIN_S, the scheduler failed, or Ray broke meanwhile.
        """
        round_ = asyncio.create_task(self._solve(round_json))
        self._rounds.add(round_)
        try:
            done, _ = await asyncio.wait({round_}, timeout=SOLVE_WITHIN_S)
        finally:
            self._rounds.discard(round_)
            round_.cancel()
        if not done:
            await self._replace_scheduler()
            raise RoundLostError(f"the scheduler has not answered within {SOLVE_WITHIN_S:.0f} s")
        if round_.cancelled():
            raise RoundLostError("Ray broke while the scheduler was at work")
        return round_.result()

    def start_runner(self, job_id: JobId) -> None:
        """See :class:`coordinator.scheduling.engine.Engine`."""
        known = self._runners.get(job_id)
        if known is not None:
            known.is_asked_for_again = True
            return
        runner = _Runner(asyncio.create_task(self._run_runner(job_id), name=f"runner {job_id}"))
        self._runners[job_id] = runner
        runner.task.add_done_callback(lambda _: self._on_runner_end(job_id, runner))

    def stop_runner(self, job_id: JobId) -> None:
        """See :class:`coordinator.scheduling.engine.Engine`; it may end with its stream before it is killed."""
        runner = self._runners.pop(job_id, None)
        if runner is not None:
            self._stopping.add(runner.task)
            asyncio.get_running_loop().call_later(_STOP_RUNNER_WITHIN_S, runner.task.cancel)

    async def close(self) -> None:
        """End the actors and the embedded Ray, or leave the cluster; harmless if that is done."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.wait({self._supervisor})
        self._ready.clear()
        await self._end_calls()
        if self._scheduler is not None:
            await asyncio.to_thread(_kill, self._scheduler)
        await self._stop_cluster()
        self._daemons_thread.shutdown(wait=False)

    async def _solve(self, round_json: str) -> str:
        await self._ready.wait()
        if not self.is_scheduler_up:
            return await self._solve_here(round_json)
        from ray.exceptions import ActorDiedError, RayError

        try:
            answer: str = await self._scheduler.solve.remote(round_json)
        except ActorDiedError as error:
            # Its process came back every time, but not the actor: it could not be set up there.
            await self._replace_scheduler()
            raise RoundLostError(f"the scheduler could not be started: {error}") from error
        except RayError as error:
            raise RoundLostError(f"the scheduler failed: {error}") from error
        return answer

    async def _solve_here(self, round_json: str) -> str:
        """A process of Ray takes seconds to start, minutes on a busy machine: nobody waits for the first of them."""
        logger.info("the scheduler's process is still starting; this round is solved here")
        try:
            return await asyncio.to_thread(solve, round_json)
        except Exception as error:
            raise RoundLostError(f"the scheduler failed: {error}") from error

    async def _replace_scheduler(self) -> None:
        """Let the next round not stand behind one that was given up."""
        if self._ready.is_set():
            await asyncio.to_thread(_kill, self._scheduler)
            await self._create_scheduler()

    async def _create_scheduler(self) -> None:
        # The name of a killed actor is free only a while later.
        name = f"scheduler-{next(self._scheduler_numbers)}"
        self._scheduler = await asyncio.to_thread(_create_actor, SchedulerActor, name=name)
        if self._coming_up is not None:
            self._coming_up.cancel()
        self.is_scheduler_up = False
        self._coming_up = asyncio.create_task(self._note_scheduler_up(self._scheduler))

    async def _note_scheduler_up(self, scheduler: Any) -> None:
        from ray.exceptions import RayError

        try:
            await scheduler.is_up.remote()
        except RayError as error:
            # The rounds that ask it hear of it themselves, and replace it.
            logger.warning("the scheduler does not start: %s", error)
        self.is_scheduler_up = True

    async def _run_runner(self, job_id: JobId) -> None:
        await self._ready.wait()
        from ray.exceptions import RayError

        runner = await asyncio.to_thread(_create_actor, RunnerActor)
        try:
            await runner.run.remote(self._address, self._bulk_address, job_id, self._incarnation, self._runner_identity)
        except RayError:
            logger.exception("the runner of %s broke", job_id)
        finally:
            await asyncio.to_thread(_kill, runner)

    def _on_runner_end(self, job_id: JobId, runner: _Runner) -> None:
        self._stopping.discard(runner.task)
        if not runner.task.cancelled() and (error := runner.task.exception()) is not None:
            logger.error("no runner for %s", job_id, exc_info=error)
        if self._runners.get(job_id) is runner:
            del self._runners[job_id]
            if runner.is_asked_for_again:
                self.start_runner(job_id)

    async def _end_calls(self) -> list[JobId]:
        """Cancel rounds and runners; returns the jobs that had a runner."""
        job_ids = list(self._runners)
        if self._coming_up is not None:
            self._coming_up.cancel()
        tasks: set[asyncio.Task[Any]] = {*self._rounds, *self._stopping, *(r.task for r in self._runners.values())}
        self._runners.clear()
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        return job_ids

    async def _start_cluster(self) -> None:
        await self._on_daemons_thread(self._cluster.start)
        _take_sigterm_back()
        await self._create_scheduler()
        self._ready.set()

    async def _stop_cluster(self) -> None:
        self._scheduler = None
        stopping = self._on_daemons_thread(self._cluster.stop)
        done, _ = await asyncio.wait({stopping}, timeout=_STOP_CLUSTER_WITHIN_S)
        if not done:
            logger.error("Ray has not stopped within %.0f s; killing it", _STOP_CLUSTER_WITHIN_S)
            await asyncio.to_thread(self._cluster.kill)
        await stopping

    async def _supervise(self) -> None:
        for look in itertools.count(1):
            await asyncio.sleep(_LOOK_EVERY_S)
            if not await self._on_daemons_thread(self._cluster.is_alive):
                await self._start_afresh()
            elif look % _RECORD_EVERY == 0:
                await self._on_daemons_thread(self._cluster.record)

    async def _start_afresh(self) -> None:
        logger.error("a daemon of Ray has died; starting a fresh Ray")
        self._ready.clear()
        for job_id in await self._end_calls():
            self.start_runner(job_id)  # waits until Ray is ready
        while not self._ready.is_set():
            try:
                await self._stop_cluster()
                await self._start_cluster()
            except Exception:
                logger.exception("Ray does not start; trying again in %.0f s", _START_AGAIN_AFTER_S)
                await asyncio.sleep(_START_AGAIN_AFTER_S)

    def _on_daemons_thread(self, call: Callable[[], Any]) -> asyncio.Future[Any]:
        return asyncio.get_running_loop().run_in_executor(self._daemons_thread, call)


def _take_sigterm_back() -> None:
    """Put Python's handler of SIGTERM back: Ray's prints a stack trace at every ordinary end and then calls ours."""
    ours = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is threading.main_thread() and ours is not None:
        signal.signal(signal.SIGTERM, ours)
        signal.siginterrupt(signal.SIGTERM, False)


def _create_actor(cls: type, *, name: str | None = None) -> Any:
    """A handle; Ray starts the process, and starts it again however it dies."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # The coordinator listens to its runners on loopback, so in a cluster they must share its node.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    # No CPU is set aside: a waiting actor must not keep others from starting on a small machine.
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": here, "name": name}
    return ray.remote(cls).options(**options).remote()


def _kill(actor: Any) -> None:
    """End an actor's process, whatever it does; harmless if it has ended."""
    import ray

    ray.kill(actor, no_restart=True)
