"""A Ray engine with a fake coordinator, on one event loop."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import grpc.aio
import psutil

from coordinator.scheduling.ray_backend.cluster import OBJECT_STORE_BYTES
from coordinator.scheduling.ray_backend.engine import RayEngine
from coordinator.scheduling.ray_backend.reaping import ProcessRecord, read_record
from plutino.types import JobId
from plutino.wire.channel import Lane, aio_server, bind
from protos import runners_pb2 as pb
from protos import runners_pb2_grpc

WAIT_S = 40.0
LOG_CHARS = 4000
INCARNATION = 7
REPOSITORY_DIR = Path(__file__).resolve().parents[2]

CHILD = """
import asyncio, sys
from pathlib import Path
from coordinator.scheduling.ray_backend.engine import RayEngine

async def main():
    engine = RayEngine(address="127.0.0.1:1", bulk_address="127.0.0.1:1", incarnation=1, state_dir=Path(sys.argv[1]))
    await engine.start()
    print("up", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


class RunnerStream:
    """One stream that a runner has opened."""

    def __init__(self, hello: pb.RunnerHello, events: AsyncIterator[pb.RunnerEvent]) -> None:
        self.hello = hello
        self.events = events
        self.commands: asyncio.Queue[pb.RunnerCommand | None] = asyncio.Queue()

    async def ask(self, command: pb.RunnerCommand) -> pb.RunnerEvent:
        self.commands.put_nowait(command)
        return await anext(self.events)

    def end(self) -> None:
        self.commands.put_nowait(None)


class FakeCoordinator(runners_pb2_grpc.RunnerServiceServicer):
    """Takes runners' streams and lets the test speak on them."""

    def __init__(self) -> None:
        self.streams: asyncio.Queue[RunnerStream] = asyncio.Queue()

    async def Run(
        self, request_iterator: AsyncIterator[pb.RunnerEvent], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.RunnerCommand]:
        events = aiter(request_iterator)
        stream = RunnerStream((await anext(events)).hello, events)
        self.streams.put_nowait(stream)
        while (command := await stream.commands.get()) is not None:
            yield command


class Site:
    """One event loop with a fake coordinator and a Ray engine for all tests of this module."""

    def __init__(self, state_dir: Path) -> None:
        self.state_dir = state_dir
        self.loop = asyncio.new_event_loop()
        self.coordinator = FakeCoordinator()
        self.run(self._start())

    async def _start(self) -> None:
        self._server = aio_server(Lane.REPORT)
        runners_pb2_grpc.add_RunnerServiceServicer_to_server(self.coordinator, self._server)
        address = bind(self._server, "127.0.0.1:0")
        await self._server.start()
        self.engine = RayEngine(
            address=address, bulk_address="127.0.0.1:1", incarnation=INCARNATION, state_dir=self.state_dir
        )
        await self.engine.start()

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(asyncio.wait_for(work, 2 * WAIT_S))

    async def next_stream(self) -> RunnerStream:
        return await asyncio.wait_for(self.coordinator.streams.get(), WAIT_S)

    async def finish(self, job_id: JobId, stream: RunnerStream) -> None:
        stream.end()
        self.engine.stop_runner(job_id)
        await until(lambda: not actor_processes("RunnerActor"))

    def close(self) -> None:
        async def stop() -> None:
            await self.engine.close()
            await self._server.stop(None)

        self.run(stop())
        self.loop.close()


def kill_a_coordinators_ray(state_dir: Path) -> ProcessRecord:
    """Start a Ray engine in a child, kill the child, and give the record that it left."""
    command = [sys.executable, "-c", CHILD, str(state_dir)]
    child = subprocess.Popen(command, cwd=REPOSITORY_DIR, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "up\n"
    finally:
        child.kill()
        child.communicate(timeout=WAIT_S)
    record = read_record(state_dir / "ray" / "processes.json")
    assert record is not None
    return record


def record_of(site: Site) -> ProcessRecord:
    record = read_record(site.state_dir / "ray" / "processes.json")
    assert record is not None
    return record


def living_children() -> list[psutil.Process]:
    """What runs below this process. A child that has ended may wait: ``subprocess`` asks after it at its next start."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


def actor_processes(name: str) -> list[psutil.Process]:
    """Processes of this module's actors of a class; Ray writes the class and the method into the command line."""
    return [process for process in living_children() if " ".join(process.cmdline()).startswith(f"ray::{name}")]


def start_second_node(session_dir: Path, *, memory_bytes: int) -> Any:
    """A small node beside the embedded one, when Ray's head has taken it in; the caller kills its processes."""
    import ray
    from ray._private.node import Node
    from ray._private.parameter import RayParams

    params = RayParams(
        gcs_address=ray.get_runtime_context().gcs_address,
        num_cpus=1,
        # Ray takes its word for it.
        num_gpus=1,
        memory=memory_bytes,
        node_ip_address="127.0.0.1",
        object_store_memory=OBJECT_STORE_BYTES,
        temp_dir=str(session_dir / "r"),
        include_log_monitor=False,
        min_worker_port=0,
        max_worker_port=0,
    )
    return Node(params, head=False, shutdown_at_exit=False, spawn_reaper=False)


def is_raylet_alive(node: Any) -> bool:
    (raylet,) = node.all_processes["raylet"]
    return raylet.process.poll() is None


def raylet_logs(node: Any) -> str:
    """What the raylets of a node's session wrote last; each start has files of its own."""
    paths = sorted(Path(node.get_logs_dir_path()).glob("*raylet*"))
    return "\n".join(f"{path.name}: ...{path.read_text(errors='replace')[-LOG_CHARS:]}" for path in paths)


def is_forgotten(node_id: str) -> bool:
    """Whether Ray's head counts a node among the dead."""
    import ray

    return not any(node["Alive"] for node in ray.nodes() if node["NodeID"] == node_id)


async def until(condition: Callable[[], Any]) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not await asyncio.to_thread(condition):
        assert time.monotonic() < deadline_s, "the condition did not come true"
        await asyncio.sleep(0.05)
