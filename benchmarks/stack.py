"""A whole plutino on this machine: a coordinator and agents as processes, started as a person starts them."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType

import psutil

from benchmarks.cores import pinned
from benchmarks.processor_quota import ProcessorQuota
from coordinator.demo.children import Child, Children
from partitioner.plan import Plan
from plutino.client import Client
from plutino.endpoint import ENDPOINT_FILE, read_endpoint
from plutino.errors import JobError
from plutino.job.spec import JobSpec
from plutino.security.identity import write_private
from plutino.types import JobId

_START_TIMEOUT_S = 180.0
_TOKEN_FILE = "join-token"
_JOIN_WITHIN_S = 24 * 3600.0
_MOST_AGENTS = 100
_REST_TIMEOUT_S = 300.0
_REST_WINDOW_S = 0.5
_REST_SHARE = 0.1
"""Of one processor over the window: heartbeats and usage take about a hundredth."""


class PlutinoStack:
    """Coordinator and agents; leaving the ``with`` block ends every process."""

    def __init__(self, state_dir: Path, *, is_plaintext: bool = False) -> None:
        self._state_dir = state_dir
        self._is_plaintext = is_plaintext
        self._children = Children(state_dir)
        self._processes: dict[str, Child] = {}

    def __enter__(self) -> PlutinoStack:
        """Start the coordinator.

        Raises:
            PlutinoError: it does not start.
        """
        self._children.__enter__()
        try:
            self._start_coordinator()
        except BaseException as error:
            self._children.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.client.close()
        self._children.__exit__(kind, error, traceback)

    def _start_coordinator(self) -> None:
        arguments = ("--engine", "local", "--listen", "127.0.0.1:0", "--api", "127.0.0.1:0")
        tls = ("--insecure-loopback",) if self._is_plaintext else ()
        command = ("-m", "coordinator.cli", "up", "--state-dir", str(self._state_dir), *arguments, *tls)
        self._processes["coordinator"] = self._children.start("coordinator", *command)
        endpoint_path = self._state_dir / ENDPOINT_FILE
        self._children.wait_for("the coordinator's start", lambda: endpoint_path.exists() or None, _START_TIMEOUT_S)
        self.client = Client.local(self._state_dir)
        if not self._is_plaintext:
            # In a file, because other users see the arguments of a process.
            token = self.client.members.create_token(uses=_MOST_AGENTS, ttl_s=_JOIN_WITHIN_S).token
            write_private(self._state_dir / _TOKEN_FILE, token.encode())

    def start_agents(
        self,
        budgets_bytes: Mapping[str, int],
        *,
        device: str = "cpu",
        devices: Mapping[str, str] | None = None,
        threads: Mapping[str, int] | None = None,
        cores: Mapping[str, Collection[int]] | None = None,
        quotas: Mapping[str, ProcessorQuota] | None = None,
        hosts: Mapping[str, tuple[str, str]] | None = None,
        has_own_caches: bool = False,
        within_s: float = _START_TIMEOUT_S,
    ) -> None:
        """Start agents with these names and memory budgets, and wait until they have joined.

        Args:
            budgets_bytes: by name.
            device: where their workers compute.
            devices: the same by name, where they differ.
            threads: of each one's workers; one, if not given.
            cores: processors that an agent and its workers may use; all, if not given.
            quotas: what bounds their processor time; nothing, if not given.
            hosts: where an agent's workers listen, and where peers are told to dial them; not for a plaintext stack.
            has_own_caches: each keeps weights and hidden states in a folder of its own, as if on a machine of its own.
            within_s: seconds until all have joined.

        Raises:
            PlutinoError: one of them ended, or did not join in time.
        """
        for name, budget_bytes in budgets_bytes.items():
            with pinned((cores or {}).get(name)):
                self._processes[name] = self._children.start(
                    f"agent-{name}",
                    *("-m", "edge_node.cli"),
                    *self._how_to_join(),
                    *("--name", name),
                    *("--memory", f"{budget_bytes}B"),
                    *("--threads", str((threads or {}).get(name, 1))),
                    *("--device", (devices or {}).get(name, device)),
                    *("--state-dir", str(self._state_dir / "agents" / name)),
                    *self._where((hosts or {}).get(name)),
                    *(("--cache-dir", str(self._state_dir / "caches" / name / "weights")) if has_own_caches else ()),
                )
            if (quota := (quotas or {}).get(name)) is not None:
                quota.take([self._processes[name].process.pid])

        def all_in() -> bool | None:
            alive = {device["name"] for device in self.client.devices() if device["state"] == "alive"}
            return set(budgets_bytes) <= alive or None

        self._children.wait_for("the agents' joining", all_in, min(within_s, _START_TIMEOUT_S))

    @staticmethod
    def _where(host: tuple[str, str] | None) -> tuple[str, ...]:
        return () if host is None else ("--listen", host[0], "--advertise", host[1])

    def _how_to_join(self) -> tuple[str, ...]:
        if self._is_plaintext:
            return ("run", "--coordinator", read_endpoint(self._state_dir)["devices_address"])
        return ("join", "--token-file", str(self._state_dir / _TOKEN_FILE))

    def stop_agents(self) -> None:
        """End all agents and their workers."""
        agents = [self._processes.pop(name) for name in list(self._processes) if name != "coordinator"]
        self._children.stop(*agents)

    def plan(self, spec: JobSpec) -> Plan:
        """The plan that a job gets now; what is measured for it is kept, so that the job gets the same one.

        Raises:
            InfeasiblePlanError: the job does not fit.
        """
        return Plan.model_validate(self.client.plan(spec))

    def pause(self, job_id: JobId) -> None:
        """Hold a job, and wait until nothing of plutino computes any more.

        Raises:
            JobError: the job does not pause, or something goes on computing.
        """
        state = self.client.pause(job_id)
        if state != "paused":
            raise JobError(f"the job was asked to pause and is {state}; its processes' logs: {self.logs()}")
        deadline_s = time.monotonic() + _REST_TIMEOUT_S
        # The workers still compute the step that they were given; its decision waits for the resume.
        while self._used_share() > _REST_SHARE:
            if time.monotonic() > deadline_s:
                raise JobError(f"a paused job computes for {_REST_TIMEOUT_S:.0f} s; logs: {self.logs()}")

    def resume(self, job_id: JobId) -> None:
        """Let a paused job go on.

        Raises:
            JobError: it does not.
        """
        state = self.client.resume(job_id)
        if state != "running":
            raise JobError(f"the job was asked to resume and is {state}; logs: {self.logs()}")

    def agents_rss_bytes(self) -> dict[str, int]:
        """Resident memory of every running agent's supervisor, as it tells in its heartbeats."""
        found = {device["name"]: device["agent_rss_bytes"] for device in self.client.devices()}
        return {name: found[name] for name in self._processes if name != "coordinator" and found.get(name)}

    def coordinator_rss_bytes(self) -> int:
        """Resident memory of the coordinator's own process."""
        return int(psutil.Process(self._processes["coordinator"].process.pid).memory_info().rss)

    def process_id(self, name: str) -> int:
        """Of an agent's supervisor, whose children its workers are."""
        return self._processes[name].process.pid

    def logs(self) -> str:
        """The end of every process's log."""
        return "\n".join(f"{name}: {child.last_words()}" for name, child in self._processes.items())

    def cpu_s(self) -> float:
        """Processor time of all processes so far; those that have ended are not counted."""
        total_s = 0.0
        for child in self._processes.values():
            parent = psutil.Process(child.process.pid)
            for process in (parent, *parent.children(recursive=True)):
                try:
                    times = process.cpu_times()
                except psutil.NoSuchProcess:
                    continue  # ended between the listing and the look
                total_s += times.user + times.system
        return total_s

    def _used_share(self) -> float:
        """Processors used over a moment."""
        before_s, started_s = self.cpu_s(), time.monotonic()
        time.sleep(_REST_WINDOW_S)
        return (self.cpu_s() - before_s) / (time.monotonic() - started_s)
