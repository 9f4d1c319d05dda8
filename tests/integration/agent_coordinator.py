"""A coordinator that speaks real gRPC to an agent whose workers are real processes without torch."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from edge_node.agent import Agent, AgentConfig
from edge_node.pool_config import PoolConfig
from edge_node.state_dir import StateDir
from plutino.errors import SecurityError
from plutino.wire.channel import Lane, aio_server, bind
from plutino.wire.status import abort_with_aio
from protos import agents_pb2, agents_pb2_grpc

FAKE_WORKER = Path(__file__).with_name("fake_worker.py")
MIB = 1 << 20
WAIT_S = 20.0


@dataclass
class FakeCoordinator(agents_pb2_grpc.AgentServiceServicer):
    """Welcomes every agent, keeps what it says and sends what a test puts in."""

    heartbeat_every_s: float = 0.05
    refused: str = ""
    shuts_out: bool = False
    hellos: list[agents_pb2.AgentHello] = field(default_factory=list)
    events: list[agents_pb2.AgentEvent] = field(default_factory=list)
    address: str = "127.0.0.1:0"

    def __post_init__(self) -> None:
        self.changed = asyncio.Condition()
        self.commands: asyncio.Queue[agents_pb2.AgentCommand] = asyncio.Queue()

    async def start(self) -> None:
        self.server = aio_server(Lane.CONTROL)
        agents_pb2_grpc.add_AgentServiceServicer_to_server(self, self.server)
        self.address = bind(self.server, self.address)
        await self.server.start()

    async def Attach(self, request_iterator, context):
        if self.shuts_out:
            await abort_with_aio(context, SecurityError("node pi-3 is revoked"))
        welcome = agents_pb2.AgentWelcome(heartbeat_every_s=self.heartbeat_every_s, refused=self.refused)
        await context.write(agents_pb2.AgentCommand(welcome=welcome))
        if self.refused:
            return
        sending = asyncio.create_task(self._send(context))
        try:
            async for event in request_iterator:
                async with self.changed:
                    if event.HasField("hello"):
                        self.hellos.append(event.hello)
                    self.events.append(event)
                    self.changed.notify_all()
        finally:
            sending.cancel()

    async def _send(self, context) -> None:
        while True:
            await context.write(await self.commands.get())

    async def until(self, found: Callable[[], object]):
        """Wait until ``found`` gives something and return it."""
        async with self.changed:
            await asyncio.wait_for(self.changed.wait_for(lambda: bool(found())), WAIT_S)
        return found()

    async def event(self, kind: str, stage: int | None = None, number: int = 0):
        """The event of this kind (about this stage), waited for."""

        def found():
            of_kind = [getattr(event, kind) for event in self.events if event.HasField(kind)]
            about = [event for event in of_kind if stage is None or event.worker.stage_index == stage]
            return about[number : number + 1]

        return (await self.until(found))[0]

    async def heartbeat(self, has: Callable[[agents_pb2.Heartbeat], object]) -> agents_pb2.Heartbeat:
        return await self.until(
            lambda: next((e.heartbeat for e in self.events[::-1] if e.HasField("heartbeat") and has(e.heartbeat)), None)
        )

    def start_worker(
        self, stage: int = 0, *, epoch: int = 1, job_id: str = "j1", budget_bytes: int = 100 * MIB, **act: object
    ) -> None:
        assignment = json.dumps({"memory_budget_bytes": budget_bytes, **act})
        start = agents_pb2.StartWorker(worker=worker(stage, epoch, job_id), assignment_json=assignment)
        self.commands.put_nowait(agents_pb2.AgentCommand(start_worker=start))

    def stop_worker(self, stage: int = 0, *, epoch: int = 1) -> None:
        stop = agents_pb2.StopWorker(worker=worker(stage, epoch), reason="cancelled by a person")
        self.commands.put_nowait(agents_pb2.AgentCommand(stop_worker=stop))

    def profile(self, request: object, request_id: str = "p1", *, only_kept: bool = False) -> None:
        message = agents_pb2.ProfileRequest(
            request_id=request_id, request_json=json.dumps(request), only_kept=only_kept
        )
        self.commands.put_nowait(agents_pb2.AgentCommand(profile=message))

    def let_profile_go_on(self, reached: agents_pb2.ProfileReached, *, is_whole: bool) -> None:
        message = agents_pb2.ProfileGoOn(request_id=reached.request_id, milestone=reached.milestone, is_whole=is_whole)
        self.commands.put_nowait(agents_pb2.AgentCommand(profile_go_on=message))


def worker(stage: int, epoch: int = 1, job_id: str = "j1") -> agents_pb2.WorkerId:
    return agents_pb2.WorkerId(job_id=job_id, plan_epoch=epoch, stage_index=stage)


def pool_config(*worker_options: str, memory_budget_bytes: int = 400 * MIB, **changes) -> PoolConfig:
    command = (sys.executable, "-S", "-E", str(FAKE_WORKER), *worker_options)
    return PoolConfig(
        memory_budget_bytes=memory_budget_bytes, threads=2, worker_command=command, spare_settle_s=0.0, **changes
    )


@asynccontextmanager
async def attached(
    coordinator: FakeCoordinator, state_dir: Path, pool: PoolConfig | None = None
) -> AsyncIterator[Agent]:
    """An agent that has said hello; at the end it is ended and no child of this process may be left."""
    await coordinator.start()
    config = AgentConfig(coordinator_address=coordinator.address, name="pi-3", pool=pool or pool_config())
    agent = Agent(config, StateDir(state_dir))
    running = asyncio.create_task(agent.run())
    try:
        known = len(coordinator.hellos)
        attaching = asyncio.create_task(coordinator.until(lambda: len(coordinator.hellos) > known))
        await asyncio.wait({attaching, running}, return_when=asyncio.FIRST_COMPLETED)
        attaching.cancel()
        yield agent
    finally:
        agent.end()
        await asyncio.wait_for(running, WAIT_S)
        await coordinator.server.stop(0)
    assert children() == []


def children() -> list[int]:
    return [child.pid for child in psutil.Process().children() if str(FAKE_WORKER) in child.cmdline()]


def run(test: Coroutine[None, None, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 50))
