"""Links of a given rate and latency between agents on one machine, without root: ``python -m benchmarks.relay PLAN``.

Every agent listens on a loopback address of its own and advertises another one; on that other one this process listens,
on the ports that the agent has open, and carries what comes on at the pace of the link. Who dials is found by whose
process holds the other end of the connection. Connections between two agents share their link, each way its own; what
nobody described passes at once. The carrying is done by :mod:`benchmarks.relay_carrier`, one process for each processor
that this one may use, ways dealt out in turns. Linux alone: it reads /proc.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from benchmarks.relay_carrier import Way, hand_over
from benchmarks.tcp_sockets import CONNECTED, LISTENING, TcpSockets

_LOOK_EVERY_S = 0.002
"""Between a port's opening and its first dial lie two messages over gRPC, which take some milliseconds."""
_DIAL_S = 5.0
_END_S = 5.0
USE_SUFFIX = ".use"
"""What the plan's file gets in place of its own suffix is where the carriers say how busy they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """An agent as its peers see it."""

    name: str
    listens: str
    advertises: str
    mark: str
    """An argument of the agent's process that no other process has; its children are told by their parent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayPlan:
    """Everything that the process is told."""

    hosts: tuple[Host, ...]
    other: Way
    ways: Mapping[str, Way] = field(default_factory=dict)
    """By :func:`way_name`, where a link differs from the others."""

    def to_json(self) -> str:
        """For the process's file."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> RelayPlan:
        """Inverse of :meth:`to_json`."""
        values = json.loads(text)
        return RelayPlan(
            hosts=tuple(Host(**host) for host in values["hosts"]),
            other=Way(**values["other"]),
            ways={name: Way(**way) for name, way in values["ways"].items()},
        )


def way_name(source: str, target: str) -> str:
    """A direction's key."""
    return f"{source} -> {target}"


class _Carriers:
    """Processes that carry; leaving the ``with`` block ends and reaps them."""

    def __init__(self, count: int, use_path: Path) -> None:
        self._count, self._use_path = count, use_path
        self._processes: list[subprocess.Popen[bytes]] = []
        self._controls: list[socket.socket] = []
        self._turns = itertools.cycle(range(count))
        self._carrier_of: dict[str, int] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> _Carriers:
        for row in range(self._count):
            own, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._controls.append(own)
            arguments = (str(other.fileno()), str(self._use_path), str(row))
            command = (sys.executable, "-m", "benchmarks.relay_carrier", *arguments)
            with other:
                self._processes.append(
                    subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=(other.fileno(),), close_fds=True)
                )
        return self

    def __exit__(self, *error: object) -> None:
        for control in self._controls:
            control.close()  # their sign to end
        for process in self._processes:
            try:
                process.wait(_END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def give(self, name: str | None, way: Way | None, source: socket.socket, target: socket.socket) -> None:
        """Have one direction carried; what has a name with the others of that name."""
        with self._lock:
            at = next(self._turns) if name is None else self._carrier_of.get(name)
            if at is None:
                at = self._carrier_of[str(name)] = next(self._turns)
        hand_over(self._controls[at], name or "", way, source, target)

    def check(self) -> None:
        """Nothing works any more without one of them.

        Raises:
            SystemExit: one of them has ended.
        """
        for process in self._processes:
            if process.poll() is not None:
                raise SystemExit(f"a carrier of the relay ended with exit code {process.returncode}")

    @property
    def process_ids(self) -> set[int]:
        """Of all of them."""
        return {process.pid for process in self._processes}


class _Relay:
    def __init__(self, plan: RelayPlan, carriers: _Carriers) -> None:
        self._plan, self._carriers = plan, carriers
        self._servers: dict[tuple[str, int], socket.socket] = {}
        self._names: dict[int, str | None] = {}

    def look(self, sockets: TcpSockets) -> None:
        """Open and close what the agents opened and closed."""
        hosts = {host.listens: host for host in self._plan.hosts}
        wanted = {(one.host, one.port) for one in sockets.of_state(LISTENING) if one.host in hosts}
        for listens, port in wanted - self._servers.keys():
            self._open(hosts[listens], port)
        for gone in self._servers.keys() - wanted:
            _end(self._servers.pop(gone))

    def _open(self, host: Host, port: int) -> None:
        try:
            server = socket.create_server((host.advertises, port), backlog=64)
        except OSError:
            return  # somebody listens on this port everywhere; it may be given up
        self._servers[host.listens, port] = server
        threading.Thread(target=self._accept, args=(server, host, port), daemon=True).start()

    def _accept(self, server: socket.socket, host: Host, port: int) -> None:
        while True:
            try:
                dialler, _ = server.accept()
            except OSError:
                return  # closed, because the agent closed its own
            threading.Thread(target=self._carry, args=(dialler, host, port), daemon=True).start()

    def _carry(self, dialler: socket.socket, host: Host, port: int) -> None:
        source = self._who(dialler.getpeername()[1])
        try:
            answerer = socket.create_connection((host.listens, port), timeout=_DIAL_S)
        except OSError:
            return dialler.close()
        with dialler, answerer:  # the carriers have descriptors of their own
            for end in (dialler, answerer):
                end.setblocking(False)
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for ends, names in (((dialler, answerer), (source, host.name)), ((answerer, dialler), (host.name, source))):
                self._carriers.give(*self._way(*names), *ends)

    def _way(self, source: str | None, target: str | None) -> tuple[str | None, Way | None]:
        if source is None or target is None:
            return None, None
        name = way_name(source, target)
        return name, self._plan.ways.get(name, self._plan.other)

    def _who(self, port: int) -> str | None:
        """The agent whose process, or whose worker, dialled from this port."""
        with TcpSockets() as sockets:
            inodes = {f"socket:[{one.inode}]" for one in sockets.of_state(CONNECTED) if one.port == port}
        # Agents were started by whoever started this, whose own sockets may have the same port towards somebody else.
        own = {os.getpid()} | self._carriers.process_ids
        for process in psutil.Process(os.getppid()).children(recursive=True):
            if process.pid not in own and not inodes.isdisjoint(_open_files(process.pid)):
                return self._name_of(process)
        return None

    def _name_of(self, process: psutil.Process) -> str | None:
        if process.pid not in self._names:
            try:
                words = {word for each in (process, *process.parents()) for word in each.cmdline()}
            except psutil.NoSuchProcess:
                return None
            self._names[process.pid] = next((host.name for host in self._plan.hosts if host.mark in words), None)
        return self._names[process.pid]


def _open_files(pid: int) -> set[str]:
    found = set()
    try:
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):  # closed since
                found.add(os.readlink(entry.path))
    except OSError:
        return found  # the process has ended
    return found


def _end(end: socket.socket) -> None:
    with contextlib.suppress(OSError):  # not connected any more
        end.shutdown(socket.SHUT_RDWR)
    end.close()


def main() -> None:
    """Carry on until SIGTERM."""
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    path = Path(sys.argv[1])
    plan = RelayPlan.from_json(path.read_text(encoding="utf-8"))
    count = max(1, min(len(os.sched_getaffinity(0)), len(plan.hosts) * (len(plan.hosts) - 1)))
    with TcpSockets() as sockets, _Carriers(count, path.with_suffix(USE_SUFFIX)) as carriers:
        relay = _Relay(plan, carriers)
        while not ended.wait(_LOOK_EVERY_S):
            relay.look(sockets)
            carriers.check()


if __name__ == "__main__":
    main()
