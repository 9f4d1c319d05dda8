"""The agent: supervises the workers of one device and answers the coordinator.

It wires the parts that do the work: :mod:`edge_node.attachment` (the control stream), :mod:`edge_node.worker_pool` (the
processes) and :mod:`edge_node.state_dir` (lock, identity, logs). It loads neither torch nor numpy, because it must be
small and must survive what kills its workers. While the coordinator is away the workers go on.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Coroutine
from dataclasses import dataclass

from edge_node.attachment import Attachment
from edge_node.cache_server import CacheServer
from edge_node.guard import limit_thread_stacks, read_usage
from edge_node.joining import Renewal
from edge_node.pool_config import PoolConfig
from edge_node.pool_reports import worker_id, worker_ref
from edge_node.processors import processor_quota, processors_of
from edge_node.reachability import Reachability
from edge_node.state_dir import StateDir, host_id
from edge_node.worker_pool import WorkerPool
from plutino.hardware import WIRE_VERSION
from plutino.security.identity import PeerName
from plutino.wire.hardware import hardware_to_proto
from protos import agents_pb2

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentConfig:
    """What the owner of a device decides."""

    coordinator_address: str
    name: str
    pool: PoolConfig
    node_id: str | None = None
    """The id in the device's certificate; None without TLS, where the device makes one up."""


class Agent:
    """One device's supervisor. Make it on a running event loop."""

    def __init__(self, config: AgentConfig, state_dir: StateDir) -> None:
        """Dials nothing and starts nothing before :meth:`run`.

        Raises:
            ConfigError: the coordinator's address is malformed.
            SecurityError: the coordinator's address is not on loopback and there is no identity, or it cannot be read.
        """
        self._config = config
        self._state_dir = state_dir
        self._agent_id = ""
        credentials = config.pool.network.credentials()
        self._renewal = None if credentials is None else Renewal(config.coordinator_address, credentials)
        self._attachment = Attachment(
            config.coordinator_address,
            hello=self._hello,
            heartbeat=self._heartbeat,
            obey=self._obey,
            credentials=credentials,
        )
        self._pool = WorkerPool(config.pool, state_dir, self._attachment.report)
        self._revoked_ids: frozenset[str] = frozenset()
        self._reachability = Reachability(self._attachment.report, config.pool.network, self._is_revoked)
        self._cache_server: CacheServer | None = None
        self._ended = asyncio.Event()
        self._is_leaving = False

    async def run(self) -> None:
        """Supervise until :meth:`end` is called. However it returns, no worker is left.

        Raises:
            ConfigError: another agent holds the state directory, or the memory budget holds no worker.
            AgentError: no worker can start on this device.
            SecurityError: the coordinator shuts this device out, or its certificate has ended.
        """
        attaching: asyncio.Task[None] | None = None
        try:
            with self._state_dir.locked():
                self._agent_id = self._config.node_id or self._state_dir.agent_id()
                limit_thread_stacks()
                pool = self._config.pool
                if pool.weights.cache_bytes:
                    self._cache_server = CacheServer(
                        pool.weights.cache(), pool.network, self._pool.has_run, self._is_revoked
                    )
                try:
                    await self._until_end(self._pool.warm_up())
                    if not self._ended.is_set():
                        attaching = asyncio.create_task(self._attachment.run())
                        renewing = asyncio.create_task(self._keep_renewed())
                        try:
                            await self._until_end(self._pool.watch(), attaching, renewing)
                        finally:
                            renewing.cancel()
                finally:
                    self._say_goodbye()
                    await self._pool.end(f"agent {self._config.name} ends")
                    if self._cache_server is not None:
                        await asyncio.to_thread(self._cache_server.close)
        finally:
            await self._reachability.close()
            # Only now: the ends of the workers are still reported on it.
            await self._attachment.close(attaching)

    def end(self) -> None:
        """Ask :meth:`run` to end the workers and return."""
        self._ended.set()

    def _say_goodbye(self) -> None:
        """Before the workers end, so that nobody plans with this device, or waits for its lease."""
        self._is_leaving = True
        self._attachment.report(agents_pb2.AgentEvent(leaving=agents_pb2.Leaving(reason="its agent was ended")))

    async def _keep_renewed(self) -> None:
        if self._renewal is None:
            await self._ended.wait()
        else:
            await self._renewal.run()

    async def _until_end(self, work: Coroutine[None, None, None], *others: asyncio.Task[None]) -> None:
        """Run ``work`` until it returns, another task ends or the agent shall end; raises what a task raised."""
        ended = asyncio.create_task(self._ended.wait())
        working = asyncio.create_task(work)
        try:
            done, _ = await asyncio.wait({ended, working, *others}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            # Once is not enough: before Python 3.12, asyncio.wait_for swallows a cancellation that meets its result.
            while not (ended.done() and working.done()):
                ended.cancel()
                working.cancel()
                await asyncio.wait({ended, working}, timeout=0.2)

    def _is_revoked(self, caller: PeerName) -> bool:
        return caller.name in self._revoked_ids

    def _hello(self) -> agents_pb2.AgentHello:
        readiness = self._pool.readiness
        return agents_pb2.AgentHello(
            agent_id=self._agent_id,
            name=self._config.name,
            host_id=host_id(),
            memory_budget_bytes=self._config.pool.memory_budget_bytes,
            threads=self._config.pool.threads,
            baseline_bytes=readiness.baseline_bytes,
            versions=readiness.versions,
            dtypes=readiness.dtypes,
            slow_dtypes=readiness.slow_dtypes,
            workers=[worker_id(ref) for ref in self._pool.running()],
            hardware=hardware_to_proto(readiness.hardware),
            wire_version=WIRE_VERSION,
            processors=processors_of(self._config.pool.device),
            processor_quota=processor_quota() or 0.0,
            cache_address="" if self._cache_server is None else self._cache_server.address,
            measures_links=True,
        )

    def _heartbeat(self) -> agents_pb2.Heartbeat:
        own = read_usage(os.getpid())
        return agents_pb2.Heartbeat(workers=self._pool.usages(), agent_rss_bytes=own.rss_bytes if own else 0)

    async def _obey(self, command: agents_pb2.AgentCommand) -> None:
        match command.WhichOneof("command"):
            case "start_worker" | "profile" as refused if self._is_leaving:
                # Sent before the goodbye was read. A process that began now would outlive the pool.
                logger.info("%s is not done: the agent ends", refused)
            case "start_worker":
                start = command.start_worker
                await self._pool.start(worker_ref(start.worker), start.assignment_json)
            case "stop_worker":
                self._pool.stop(worker_ref(command.stop_worker.worker), command.stop_worker.reason)
            case "profile":
                asked = command.profile
                await self._pool.profile(asked.request_id, asked.request_json, only_kept=asked.only_kept)
            case "profile_go_on":
                go_on = command.profile_go_on
                self._pool.go_on(go_on.request_id, go_on.milestone, is_whole=go_on.is_whole)
            case "open_door":
                self._reachability.open_door(command.open_door)
            case "knock":
                self._reachability.knock(command.knock)
            case "revoked":
                self._revoked_ids = frozenset(command.revoked.node_ids)
                if self._cache_server is not None:
                    self._cache_server.cut_revoked()
            case other:
                logger.warning("the coordinator sent %r, which this version does not know; ignored", other)


def run_agent(config: AgentConfig, state_dir: StateDir) -> None:
    """Run an agent until SIGTERM or SIGINT; raises as :meth:`Agent.run`."""

    async def supervise() -> None:
        agent = Agent(config, state_dir)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, agent.end)
        await agent.run()

    asyncio.run(supervise())
