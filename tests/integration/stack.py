"""A whole plutino for tests: a real coordinator (in a thread, or a process that can be killed) and thread agents.

A thread agent speaks the agents' protocol over real gRPC, but runs workers as threads of the test process: the same
:class:`edge_node.session.WorkerSession`, with real data streams, without the 4 s of imports that a process costs.
"""

from __future__ import annotations

import asyncio
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import torch

from coordinator.app import CoordinatorConfig, run_coordinator
from coordinator.artifacts.verify import verify_adapter
from coordinator.fleet.registry import Patience
from coordinator.jobs.endpoints import Endpoints
from coordinator.scheduling.local import LocalEngine
from edge_node.cache_server import CacheServer
from edge_node.going_on import KeptState
from edge_node.joining import Membership
from edge_node.network import DeviceNetwork
from edge_node.session import WorkerSession
from edge_node.stage.resident import ResidentStage
from edge_node.supervision import refusal
from edge_node.weights_config import WeightsConfig
from partitioner.device import BlockTimings
from plutino.hardware import WIRE_VERSION, Hardware
from plutino.job.assignment import WorkerAssignment
from plutino.job.spec import JobSpec, parse_spec
from plutino.security.tls import Credentials
from plutino.types import WorkerRef
from plutino.wire.channel import Lane, sync_channel
from plutino.wire.convert import worker_from_proto, worker_to_proto
from plutino.wire.hardware import hardware_to_proto
from protos import agents_pb2, agents_pb2_grpc, jobs_pb2, jobs_pb2_grpc
from tests.leash import Leash

REPOSITORY_DIR = Path(__file__).resolve().parent.parent.parent
WAIT_S = 50.0
HARDWARE = Hardware(name="thread", machine="x86_64", arithmetic="cpu x86_64 test")
TIMINGS = BlockTimings(forward_s=0.01, backward_s=0.02, embedding_s=0.001, head_forward_s=0.005, head_backward_s=0.01)


def wait_until(condition: Callable[[], Any], what: str, *, within_s: float = WAIT_S) -> Any:
    """Poll until a condition holds, within a bound."""
    deadline_s = time.monotonic() + within_s
    while not (result := condition()):
        assert time.monotonic() < deadline_s, f"{what} did not happen within {within_s:.0f} s"
        time.sleep(0.02)
    return result


def verifying_here(config: CoordinatorConfig, endpoints: Endpoints, incarnation: int) -> LocalEngine:
    """The local engine, verifying in this process, which has torch already: a process of its own takes 5 s to start."""
    return LocalEngine(
        address=endpoints.people_address,
        bulk_address=endpoints.bulk_address,
        incarnation=incarnation,
        verify=verify_adapter,
        runner_identity=endpoints.runner_identity,
    )


class ThreadCoordinator:
    """A coordinator on an event loop in a thread."""

    def __init__(self, state_dir: Path, *, lease_s: float = 15.0, **changes: Any) -> None:
        """``changes`` replace settings; without any it runs in plain."""
        self._ready = threading.Event()
        self._config = CoordinatorConfig(
            state_dir=state_dir,
            devices_address="127.0.0.1:0",
            people_address="127.0.0.1:0",
            engine="local",
            # Tests wait themselves until all their agents are in.
            **{
                "patience": Patience(lease_s=lease_s, settle_s=0.0, return_s=1.0),
                "is_plaintext": True,
                **changes,
            },
        )
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="coordinator")
        self._thread.start()
        assert self._ready.wait(WAIT_S), "the coordinator did not start"
        if self.error is not None:
            raise self.error

    def _run(self) -> None:
        async def main() -> None:
            self._loop = asyncio.get_running_loop()
            self._stop = asyncio.Event()
            await run_coordinator(self._config, self._on_ready, stop=self._stop, make_engine=verifying_here)

        try:
            asyncio.run(main())
        except BaseException as error:
            self.error = error
            self._ready.set()

    def _on_ready(self, endpoints: Endpoints) -> None:
        self.endpoints = endpoints
        self._ready.set()

    def close(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()
        if self.error is not None:
            raise self.error


class ProcessCoordinator:
    """A coordinator in a process of its own, which a test may kill."""

    def __init__(self, state_dir: Path, *, crash_at: str = "", settle_s: float = 0.0) -> None:
        self._state_dir = state_dir
        state_dir.mkdir(exist_ok=True)
        (state_dir / "endpoint.json").unlink(missing_ok=True)
        path = os.pathsep.join([str(REPOSITORY_DIR), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path, "PLUTINO_CRASH_AT": crash_at}
        self._log = (state_dir / "coordinator.log").open("ab")
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "coordinator_process.py"), str(state_dir), str(settle_s)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )
        self._leash = Leash()
        self._leash.hold(self.process.pid)

    @property
    def endpoints(self) -> Endpoints:
        """Where it is reached, once it is."""
        path = self._state_dir / "endpoint.json"
        wait_until(lambda: path.exists() or self.process.poll() is not None, "the coordinator's start")
        assert path.exists(), f"the coordinator ended: {(self._state_dir / 'coordinator.log').read_text()[-2000:]}"
        values = json.loads(path.read_text())
        return Endpoints(**{key: values[key] for key in ("devices_address", "people_address", "bulk_address")})

    def wait_for_crash(self) -> None:
        assert self.process.wait(WAIT_S) == -9, f"ended otherwise: {self.process.returncode}"

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(WAIT_S)
        self._leash.let_go(self.process.pid)
        self._leash.close()
        self._log.close()


class ThreadAgent:
    """An agent whose workers are threads of this process.

    What a worker measures as its own memory is the whole process's, tests that ran before included: hence the baseline.
    """

    def __init__(
        self,
        address: str,
        name: str,
        *,
        memory_bytes: int = 1 << 40,
        threads: int = 1,
        baseline_bytes: int = 16 << 30,
        torch_version: str = torch.__version__,
        hardware: Hardware = HARDWARE,
        host_id: str = "test",
        timings: BlockTimings = TIMINGS,
        weights: WeightsConfig | None = None,
        membership: Membership | None = None,
    ) -> None:
        self._network = (
            DeviceNetwork()
            if membership is None
            else DeviceNetwork.of_member(membership.identity, membership.devices_address)
        )
        self._credentials = self._network.credentials()
        self._agent_id = f"id-{name}" if membership is None else membership.node_id
        self.refusals: list[grpc.RpcError] = []
        self.revoked_ids: list[str] = []
        self._weights = weights
        self._cache_server = None
        if weights is not None:
            self._cache_server = CacheServer(weights.cache(), DeviceNetwork(), lambda job_id: job_id in self.job_ids)
        self.name = name
        self._address = address
        self._memory_bytes = memory_bytes
        self._threads = threads
        self._baseline_bytes = baseline_bytes
        self._versions = {"torch": torch_version}
        self._hardware = hardware
        self._host_id = host_id
        self.timings = timings
        self.sessions: dict[WorkerRef, WorkerSession] = {}
        self.assignments: list[WorkerAssignment] = []
        self.num_profiles = 0
        """How often it was asked to measure."""
        self.stopped: list[WorkerRef] = []
        """Workers that were ended by command, not by their own job's end."""
        self.residents: dict[tuple[int, str], ResidentStage] = {}
        """Stages that workers have left loaded, by stage index and key."""
        self.kept_states: dict[str, KeptState] = {}
        """What workers trained that go on, by job."""
        self._worker_threads: list[threading.Thread] = []
        self._exited: list[agents_pb2.AgentEvent] = []
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._is_deaf = threading.Event()
        self._is_stalled = threading.Event()
        self.num_streams = 0
        self._beat_every_s = 0.05
        self._outgoing: queue.SimpleQueue[agents_pb2.AgentEvent | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"agent {name}")
        self._thread.start()
        self._pulse = threading.Thread(target=self._beat, name=f"pulse {name}")
        self._pulse.start()

    @property
    def job_ids(self) -> set[str]:
        """Jobs that this device has run."""
        return {assignment.job_id for assignment in list(self.assignments)}

    def lose_worker(self, ref: WorkerRef, reason: str = "killed by signal 9", *, out_of_memory: bool = False) -> None:
        """A worker's memory is gone, as after kill -9."""
        self._report(ref, -9, reason, out_of_memory)
        self.sessions[ref].end("lost")

    def ignore_commands(self) -> None:
        """From now on nothing it is told is done: a job that starts a worker here stays in loading."""
        self._is_deaf.set()

    def stall(self) -> None:
        """From now on nothing is heard of it, though its stream stays up."""
        self._is_stalled.set()

    def wake_up(self) -> None:
        """End of :meth:`stall`."""
        self._is_stalled.clear()

    def leave(self) -> None:
        """A clean stop: it says goodbye, and its workers end."""
        self._send(agents_pb2.AgentEvent(leaving=agents_pb2.Leaving(reason="its agent was ended")))
        self.close()

    def close(self) -> None:
        self._closing.set()
        for session in list(self.sessions.values()):
            session.end("the test is over")
        self._outgoing.put(None)
        if self._cache_server is not None:
            self._cache_server.close()
        for thread in [*self._worker_threads, self._thread, self._pulse]:
            thread.join(WAIT_S)
            assert not thread.is_alive(), f"{thread.name} does not end"

    def _run(self) -> None:
        while not self._closing.is_set():
            with self._lock:
                self.num_streams += 1
                outgoing = self._outgoing = queue.SimpleQueue()
                outgoing.put(agents_pb2.AgentEvent(hello=self._hello()))
                for event in self._exited:
                    outgoing.put(event)
            if self._closing.is_set():
                return
            channel = sync_channel(self._address, Lane.CONTROL, self._credentials)
            try:
                stub = agents_pb2_grpc.AgentServiceStub(channel)
                for command in stub.Attach(iter(outgoing.get, None)):
                    self._on_command(command)
            except grpc.RpcError as error:
                self.refusals.append(error)
                self._closing.wait(0.05)
            finally:
                outgoing.put(None)
                channel.close()

    def _beat(self) -> None:
        while not self._closing.wait(self._beat_every_s):
            if self._is_stalled.is_set():
                continue
            self._send(agents_pb2.AgentEvent(heartbeat=agents_pb2.Heartbeat()))

    def _hello(self) -> agents_pb2.AgentHello:
        return agents_pb2.AgentHello(
            agent_id=self._agent_id,
            name=self.name,
            host_id=self._host_id,
            memory_budget_bytes=self._memory_bytes,
            threads=self._threads,
            baseline_bytes=self._baseline_bytes,
            versions=self._versions,
            dtypes=["fp32", "bf16"],
            workers=[worker_to_proto(ref) for ref in self.sessions],
            hardware=hardware_to_proto(self._hardware),
            wire_version=WIRE_VERSION,
            cache_address="" if self._cache_server is None else self._cache_server.address,
        )

    def _on_command(self, command: agents_pb2.AgentCommand) -> None:
        kind = command.WhichOneof("command")
        if kind == "welcome":
            self._beat_every_s = command.welcome.heartbeat_every_s
        elif self._is_deaf.is_set() and kind != "profile":
            return
        elif kind == "start_worker":
            self._start(WorkerAssignment.model_validate_json(command.start_worker.assignment_json))
        elif kind == "stop_worker":
            session = self.sessions.get(worker_from_proto(command.stop_worker.worker))
            if session is not None:
                self.stopped.append(worker_from_proto(command.stop_worker.worker))
                session.end(command.stop_worker.reason)
        elif kind == "revoked":
            self.revoked_ids = list(command.revoked.node_ids)
        elif kind == "profile":
            self.num_profiles += 1
            # As a real agent, which measures in one worker more.
            why = refusal(self._baseline_bytes, self._promised(), self._memory_bytes)
            found = {"timings_json": self.timings.model_dump_json()} if why is None else {"error": why}
            result = agents_pb2.ProfileResult(request_id=command.profile.request_id, **found)
            self._send(agents_pb2.AgentEvent(profile_result=result))

    def _promised(self) -> list[int]:
        """Budgets of the workers that run."""
        return [one.memory_budget_bytes for one in list(self.assignments) if one.ref in self.sessions]

    def _start(self, assignment: WorkerAssignment) -> None:
        ref = assignment.ref
        if ref in self.sessions:
            return
        why = refusal(assignment.memory_budget_bytes, self._promised(), self._memory_bytes)
        if why is not None:
            exited = agents_pb2.WorkerExited(worker=worker_to_proto(ref), exit_code=1, reason=f"not started: {why}")
            self._send(agents_pb2.AgentEvent(worker_exited=exited))
            return
        self.assignments.append(assignment)
        resident = self.residents.pop((assignment.stage_index, assignment.stage_key), None)
        kept = self.kept_states.pop(assignment.job_id, None)
        session = WorkerSession(assignment, self._network, weights=self._weights, resident=resident, kept=kept)
        self.sessions[ref] = session
        self._send(agents_pb2.AgentEvent(worker_started=agents_pb2.WorkerStarted(worker=worker_to_proto(ref), pid=1)))
        thread = threading.Thread(target=self._work, args=(ref, session, assignment.threads), name=str(ref))
        self._worker_threads.append(thread)
        thread.start()

    def _work(self, ref: WorkerRef, session: WorkerSession, threads: int) -> None:
        torch.set_num_threads(threads)
        try:
            reason, code = session.run(), 0
            if session.goes_on and (state := session.take_state()) is not None:
                self.kept_states[ref.job_id] = state
            elif (kept := session.take_stage()) is not None:
                self.residents[ref.stage_index, kept.key] = kept
        except Exception as error:
            reason, code = f"{type(error).__name__}: {error}", 1
        self._report(ref, code, reason, False)

    def _report(self, ref: WorkerRef, code: int, reason: str, out_of_memory: bool) -> None:
        if self.sessions.get(ref) is None:
            return
        exited = agents_pb2.WorkerExited(
            worker=worker_to_proto(ref), exit_code=code, reason=reason, out_of_memory=out_of_memory
        )
        event = agents_pb2.AgentEvent(worker_exited=exited)
        if code == -9:
            self._send(event)
            return
        self.sessions.pop(ref)
        self._exited.append(event)
        self._send(event)

    def _send(self, event: agents_pb2.AgentEvent) -> None:
        with self._lock:
            self._outgoing.put(event)


class People:
    """What a person does, over the real JobService; goes on when the coordinator comes back elsewhere."""

    def __init__(self, address: str, credentials: Credentials | None = None) -> None:
        self._channel = sync_channel(address, Lane.REPORT, credentials)
        self.stub = jobs_pb2_grpc.JobServiceStub(self._channel)

    def submit(self, spec: JobSpec, key: str = "") -> str:
        request = jobs_pb2.SubmitRequest(spec_json=spec.model_dump_json(), idempotency_key=key)
        return self.stub.Submit(request, timeout=WAIT_S, wait_for_ready=True).job_id

    def job(self, job_id: str) -> jobs_pb2.JobSummary:
        return self.stub.Get(jobs_pb2.GetRequest(job_id=job_id), timeout=WAIT_S, wait_for_ready=True).summary

    def detail(self, job_id: str) -> dict[str, Any]:
        request = jobs_pb2.GetRequest(job_id=job_id)
        return json.loads(self.stub.Get(request, timeout=WAIT_S, wait_for_ready=True).detail_json)

    def devices(self) -> list[dict[str, Any]]:
        answer = self.stub.Devices(jobs_pb2.DevicesRequest(), timeout=WAIT_S, wait_for_ready=True)
        return json.loads(answer.devices_json)

    def events(self, job_id: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for event in self.stub.Watch(jobs_pb2.WatchRequest(job_id=job_id), timeout=WAIT_S):
            yield event.kind, json.loads(event.json)

    def wait_for_step(self, job_id: str, step: int) -> None:
        wait_until(lambda: self.job(job_id).step >= step or self.is_over(job_id), f"step {step} of {job_id}")
        assert self.job(job_id).step >= step, self.job(job_id)

    def is_over(self, job_id: str) -> bool:
        return self.job(job_id).state in ("succeeded", "failed", "cancelled")

    def wait(self, job_id: str) -> jobs_pb2.JobSummary:
        wait_until(lambda: self.is_over(job_id), f"the end of {job_id}")
        return self.job(job_id)

    def close(self) -> None:
        self._channel.close()


def losses(detail: dict[str, Any]) -> list[float]:
    """Losses of the surviving lineage, by step."""
    return [row["loss"] for row in sorted(detail["ledger"], key=lambda r: r["step"]) if row["status"] == "committed"]


def make_spec(model_dir: Path, train: Path, output: Path, **parts: Any) -> JobSpec:
    """A job on a model folder; ``parts`` override the spec's parts."""
    values: dict[str, Any] = {
        "name": "test",
        "model": {"path": str(model_dir), "dtype": "fp32"},
        "data": {"train": str(train)},
        "output": {"dir": str(output)},
        # Thread agents make their profiles up: that their workers' pace differs from them means nothing.
        "placement": {"replan": "never"},
    }
    for part, override in parts.items():
        values[part] = {**values.get(part, {}), **override}
    return parse_spec(values, base_dir=output.parent)
