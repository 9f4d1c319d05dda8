"""The agent against a coordinator that speaks real gRPC, with workers that are real processes without torch."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from edge_node.agent import Agent, AgentConfig
from edge_node.state_dir import StateDir
from edge_node.worker_pool import PoolConfig
from plutino.errors import AgentError, ConfigError, SecurityError
from plutino.wire.channel import Lane, aio_server, bind
from plutino.wire.status import abort_with_aio
from protos import agents_pb2, agents_pb2_grpc

FAKE_WORKER = Path(__file__).with_name("fake_worker.py")
MIB = 1 << 20
WAIT_S = 20.0

pytestmark = pytest.mark.timeout(60)


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

    def start_worker(self, stage: int = 0, *, epoch: int = 1, budget_bytes: int = 100 * MIB, **act: object) -> None:
        assignment = json.dumps({"memory_budget_bytes": budget_bytes, **act})
        start = agents_pb2.StartWorker(worker=worker(stage, epoch), assignment_json=assignment)
        self.commands.put_nowait(agents_pb2.AgentCommand(start_worker=start))

    def stop_worker(self, stage: int = 0, *, epoch: int = 1) -> None:
        stop = agents_pb2.StopWorker(worker=worker(stage, epoch), reason="cancelled by a person")
        self.commands.put_nowait(agents_pb2.AgentCommand(stop_worker=stop))

    def profile(self, request: object) -> None:
        message = agents_pb2.ProfileRequest(request_id="p1", request_json=json.dumps(request))
        self.commands.put_nowait(agents_pb2.AgentCommand(profile=message))


def worker(stage: int, epoch: int = 1) -> agents_pb2.WorkerId:
    return agents_pb2.WorkerId(job_id="j1", plan_epoch=epoch, stage_index=stage)


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


def test_agent_hello_comes_after_ready_and_carries_what_the_worker_measured(tmp_path):
    async def test():
        coordinator = FakeCoordinator()
        async with attached(coordinator, tmp_path):
            hello = coordinator.hellos[0]

        assert coordinator.events[0].HasField("hello")
        assert (hello.name, hello.threads, hello.baseline_bytes) == ("pi-3", 2, 20 * MIB)
        assert (list(hello.dtypes), dict(hello.versions), list(hello.workers)) == (["fp32"], {"torch": "0"}, [])

    run(test())


def test_agent_keeps_its_identity_over_restarts(tmp_path):
    async def test():
        coordinator = FakeCoordinator()
        for _ in range(2):
            async with attached(coordinator, tmp_path):
                pass

        first, second = coordinator.hellos
        assert first.agent_id == second.agent_id != ""
        assert first.host_id == second.host_id != ""

    run(test())


def test_agent_start_takes_the_spare_and_stop_reports_the_exit(tmp_path):
    async def test():
        coordinator = FakeCoordinator()
        async with attached(coordinator, tmp_path):
            spare = children()
            coordinator.start_worker()
            started = await coordinator.event("worker_started")
            coordinator.stop_worker()
            exited = await coordinator.event("worker_exited")

        assert spare == [started.pid]
        assert exited.worker == worker(0)
        assert (exited.exit_code, exited.reason) == (-signal.SIGTERM, "stopped: cancelled by a person")

    run(test())


def test_agent_start_of_a_running_worker_leaves_it_alone(tmp_path):
    async def test():
        coordinator = FakeCoordinator()
        async with attached(coordinator, tmp_path):
            coordinator.start_worker()
            coordinator.start_worker()
            first = await coordinator.event("worker_started", number=0)
            second = await coordinator.event("worker_started", number=1)

        assert first.pid == second.pid

    run(test())


def test_agent_stop_of_a_worker_that_is_gone_reports_it_exited(tmp_path):
    async def test():
        coordinator = FakeCoordinator()
        async with attached(coordinator, tmp_path):
            coordinator.stop_worker(stage=3)
            exited = await coordinator.event("worker_exited")

        assert exited.worker == worker(3)
        assert "was not running" in exited.reason

    run(test())


def test_agent_stop_of_a_worker_deaf_to_sigterm_kills_it(tmp_path):
    async def test():
        coordinator = FakeCoordinator()
        async with attached(coordinator, tmp_path, pool_config(stop_grace_s=0.05)):
            coordinator.start_worker(act="ignore-sigterm")
            await coordinator.event("worker_started")
            log = tmp_path / "logs" / "worker-1.log"
            await coordinator.heartbeat(lambda _: "ignoring" in log.read_text())
            coordinator.stop_worker()
            exited = await coordinator.event("worker_exited")

        assert exited.exit_code == -signal.SIGKILL
        assert exited.reason == "stopped: cancelled by a person"

    run(test())


def test_agent_newer_plan_epoch_ends_the_older_worker_first(tmp_path):
    async def test():
        coordinator = FakeCoordinator()
        async with attached(coordinator, tmp_path, pool_config(memory_budget_bytes=150 * MIB)):
            coordinator.start_worker(epoch=1)
            coordinator.start_worker(epoch=2)
            exited = await coordinator.event("worker_exited")
            started = await coordinator.event("worker_started", number=1)
            coordinator.start_worker(epoch=1)
            stale = await coordinator.event("worker_exited", number=1)

        assert (exited.worker.plan_epoch, started.worker.plan_epoch) == (1, 2)
        assert stale.worker.plan_epoch == 1
        assert "older plan" in stale.reason

    run(test())


def test_agent_worker_killed_from_outside_is_reported_with_its_signal(tmp_path):
    async def test():
        coordinator = FakeCoordinator()
        async with attached(coordinator, tmp_path):
            coordinator.start_worker()
            started = await coordinator.event("worker_started")
            os.kill(started.pid, signal.SIGKILL)
            exited = await coordinator.event("worker_exited")

        assert exited.exit_code == -signal.SIGKILL
        assert "SIGKILL" in exited.reason
        assert "worker-1.log" in exited.reason

    run(test())


@pytest.mark.parametrize(
    ("act", "exit_code", "reason"),
    [
        ({"act": "exit", "exit_code": 7}, 7, "exit code 7"),
        ({"act": "fail"}, 3, "ModelError: 2 of 3 tensors missing"),
    ],
)
def test_agent_worker_that_ends_itself_is_reported_with_its_own_words(tmp_path, act, exit_code, reason):
    async def test():
        coordinator = FakeCoordinator()
        async with attached(coordinator, tmp_path):
            coordinator.start_worker(**act)
            exited = await coordinator.event("worker_exited")

        assert exited.exit_code == exit_code
        assert reason in exited.reason

    run(test())


def test_agent_worker_above_its_budget_is_killed_with_the_numbers(tmp_path):
    async def test():
        coordinator = FakeCoordinator()
        async with attached(coordinator, tmp_path):
            coordinator.start_worker(budget_bytes=64 * MIB, act="eat", bytes=100 * MIB)
            exited = await coordinator.event("worker_exited")

        assert exited.out_of_memory
        assert exited.exit_code == -signal.SIGKILL
        assert "its memory budget is 64 MiB" in exited.reason

    run(test())


def test_agent_start_beyond_the_devices_memory_is_refused_with_the_numbers(tmp_path):
    async def test():
        coordinator = FakeCoordinator()
        async with attached(coordinator, tmp_path, pool_config(memory_budget_bytes=150 * MIB)):
            coordinator.start_worker(stage=0)
            coordinator.start_worker(stage=1)
            exited = await coordinator.event("worker_exited", stage=1)

        assert "1 running workers take 100 MiB of the device's 150 MiB" in exited.reason

    run(test())


def test_agent_coordinator_restart_keeps_workers_and_reports_them(tmp_path):
    async def test():
        coordinator = FakeCoordinator()
        async with attached(coordinator, tmp_path):
            coordinator.start_worker(stage=2)
            started = await coordinator.event("worker_started")
            await coordinator.server.stop(0)
            await coordinator.start()
            await coordinator.until(lambda: len(coordinator.hellos) == 2)

            assert list(coordinator.hellos[1].workers) == [worker(2)]
            assert psutil.pid_exists(started.pid)

    run(test())


def test_agent_exit_while_the_coordinator_is_away_is_reported_later(tmp_path):
    async def test():
        coordinator = FakeCoordinator()
        async with attached(coordinator, tmp_path):
            coordinator.start_worker()
            started = await coordinator.event("worker_started")
            await coordinator.server.stop(0)
            os.kill(started.pid, signal.SIGKILL)
            await coordinator.start()
            exited = await coordinator.event("worker_exited")

        assert exited.worker == worker(0)

    run(test())


def test_agent_heartbeat_carries_usage_of_jobs_workers_only(tmp_path):
    async def test():
        coordinator = FakeCoordinator()
        async with attached(coordinator, tmp_path):
            coordinator.start_worker()
            heartbeat = await coordinator.heartbeat(lambda heartbeat: heartbeat.workers)

        (usage,) = heartbeat.workers
        assert usage.worker == worker(0)
        assert usage.peak_rss_bytes >= usage.rss_bytes > MIB
        assert heartbeat.agent_rss_bytes > MIB

    run(test())


def test_agent_spare_comes_back_where_the_budget_has_room(tmp_path):
    async def test():
        coordinator = FakeCoordinator()
        async with attached(coordinator, tmp_path):
            coordinator.start_worker()
            await coordinator.event("worker_started")
            await coordinator.heartbeat(lambda _: len(children()) == 2)

    run(test())


def test_agent_without_room_for_a_spare_answers_a_profile_with_the_reason(tmp_path):
    async def test():
        coordinator = FakeCoordinator()
        async with attached(coordinator, tmp_path, pool_config(memory_budget_bytes=110 * MIB)):
            coordinator.start_worker()
            coordinator.profile({})
            result = await coordinator.event("profile_result")

            assert "100 MiB of 110 MiB" in result.error
            assert len(children()) == 1

    run(test())


def test_agent_profile_is_measured_by_the_spare(tmp_path):
    async def test():
        coordinator = FakeCoordinator()
        async with attached(coordinator, tmp_path):
            coordinator.profile({"threads": 2})
            result = await coordinator.event("profile_result")

        assert result.request_id == "p1"
        assert json.loads(result.timings_json) == {"asked": {"threads": 2}}

    run(test())


def test_agent_profile_that_kills_the_spare_is_answered_with_an_error(tmp_path):
    async def test():
        coordinator = FakeCoordinator()
        async with attached(coordinator, tmp_path):
            coordinator.profile({"die": True})
            result = await coordinator.event("profile_result")

        assert "SIGABRT" in result.error

    run(test())


def test_agent_whose_worker_cannot_import_ends_with_the_tail_of_its_log(tmp_path):
    async def test():
        agent = Agent(
            AgentConfig(coordinator_address="127.0.0.1:1", name="n", pool=pool_config("--start", "import-error")),
            StateDir(tmp_path),
        )
        with pytest.raises(AgentError, match=r"(?s)worker-1\.log.*No module named 'torch'"):
            await agent.run()

    run(test())


def test_agent_whose_worker_breaks_the_protocol_says_so(tmp_path):
    async def test():
        pool = pool_config("--start", "babble")
        agent = Agent(AgentConfig(coordinator_address="127.0.0.1:1", name="n", pool=pool), StateDir(tmp_path))
        with pytest.raises(AgentError, match="malformed event"):
            await agent.run()

    run(test())


def test_agent_with_less_memory_than_a_baseline_is_refused(tmp_path):
    async def test():
        pool = pool_config("--baseline-bytes", str(400 * MIB), memory_budget_bytes=300 * MIB)
        agent = Agent(AgentConfig(coordinator_address="127.0.0.1:1", name="n", pool=pool), StateDir(tmp_path))
        with pytest.raises(ConfigError, match="400 MiB before any job, the device offers 300 MiB"):
            await agent.run()

    run(test())
    assert children() == []


def test_agent_that_is_shut_out_ends_its_workers_and_itself(tmp_path):
    async def test():
        coordinator = FakeCoordinator()
        await coordinator.start()
        agent = Agent(
            AgentConfig(coordinator_address=coordinator.address, name="pi-3", pool=pool_config()), StateDir(tmp_path)
        )
        running = asyncio.create_task(agent.run())
        await coordinator.until(lambda: coordinator.hellos)
        coordinator.start_worker()
        await coordinator.event("worker_started")
        coordinator.shuts_out = True
        await coordinator.server.stop(0)
        await coordinator.start()

        with pytest.raises(SecurityError, match="revoked"):
            await asyncio.wait_for(running, WAIT_S)
        await coordinator.server.stop(0)
        assert children() == []

    run(test())


def test_second_agent_of_a_state_dir_is_refused(tmp_path):
    async def test():
        coordinator = FakeCoordinator()
        async with attached(coordinator, tmp_path):
            config = AgentConfig(coordinator_address=coordinator.address, name="n", pool=pool_config())
            with pytest.raises(ConfigError, match=f"process {os.getpid()}"):
                await Agent(config, StateDir(tmp_path)).run()

    run(test())


def test_agent_killed_leaves_no_worker_and_no_lock(tmp_path):
    program = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(FAKE_WORKER.parents[2])!r})
from edge_node.agent import AgentConfig, run_agent
from edge_node.state_dir import StateDir
from edge_node.worker_pool import PoolConfig
pool = PoolConfig(memory_budget_bytes=2**30, threads=1, worker_command=(sys.executable, "-S", {str(FAKE_WORKER)!r}))
run_agent(AgentConfig(coordinator_address=sys.argv[1], name="n", pool=pool), StateDir(Path({str(tmp_path)!r})))
"""

    async def test():
        coordinator = FakeCoordinator()
        await coordinator.start()
        agent = subprocess.Popen([sys.executable, "-c", program, coordinator.address])
        try:
            await coordinator.until(lambda: coordinator.hellos)
            workers = psutil.Process(agent.pid).children()
        finally:
            agent.kill()
            agent.wait(WAIT_S)
            await coordinator.server.stop(0)
        gone, alive = psutil.wait_procs(workers, WAIT_S)

        assert (len(gone), alive) == (1, [])
        with StateDir(tmp_path).locked():
            pass

    run(test())


HELD = {"act": "hold", "stage_key": "blocks 0-3", "keeps_stage_s": 60.0}


def test_agent_gives_the_next_job_of_a_held_stage_to_the_worker_that_holds_it(tmp_path):
    async def test():
        coordinator = FakeCoordinator()
        async with attached(coordinator, tmp_path):
            coordinator.start_worker(**HELD)
            first = await coordinator.event("worker_started")
            exited = await coordinator.event("worker_exited")
            # With both budgets the device would be over its own: the holder's must not count twice.
            coordinator.start_worker(stage=1, budget_bytes=350 * MIB, **HELD)
            second = await coordinator.event("worker_started", stage=1)

        assert (exited.exit_code, exited.worker) == (0, worker(0)) and "holds its stage for 60 s" in exited.reason
        assert second.pid == first.pid

    run(test())


def test_agent_ends_a_held_stage_whose_memory_another_job_needs(tmp_path):
    async def test():
        coordinator = FakeCoordinator()
        async with attached(coordinator, tmp_path):
            coordinator.start_worker(**HELD)
            first = await coordinator.event("worker_started")
            await coordinator.event("worker_exited")
            coordinator.start_worker(stage=1, budget_bytes=350 * MIB, stage_key="blocks 3-6")
            second = await coordinator.event("worker_started", stage=1)
            assert not psutil.pid_exists(first.pid)

        assert second.pid != first.pid

    run(test())


def test_agent_ends_a_held_stage_when_its_time_is_over(tmp_path):
    async def test():
        coordinator = FakeCoordinator()
        async with attached(coordinator, tmp_path):
            coordinator.start_worker(**{**HELD, "keeps_stage_s": 0.0})
            first = await coordinator.event("worker_started")
            await coordinator.event("worker_exited")
            while psutil.pid_exists(first.pid):  # within the bound of run()
                await asyncio.sleep(0.02)

    run(test())
