"""Links of a given rate and latency between agents on one machine, without root: ``python -m benchmarks.relay PLAN``.

Every agent listens on a loopback address of its own and advertises another one; on that other one this process listens,
on the ports that the agent has open, and carries what comes on at the pace of the link. Who dials is found by whose
process holds the other end of the connection. Connections between two agents share their link, each way its own; what
nobody described passes at once. Linux alone: it reads /proc.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from benchmarks.tcp_sockets import CONNECTED, LISTENING, TcpSockets

_CHUNK_BYTES = 64 * 1024
_LOOK_EVERY_S = 0.002
"""Between a port's opening and its first dial lie two messages over gRPC, which take some milliseconds."""
_DIAL_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """An agent as its peers see it."""

    name: str
    listens: str
    advertises: str
    mark: str
    """An argument of the agent's process that no other process has; its children are told by their parent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """A link, one way."""

    bytes_per_s: float
    latency_s: float


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


class Pacer:
    """When what comes may go on: one after the other at the rate, and later by the latency. For several threads."""

    def __init__(self, way: Way) -> None:
        self._way = way
        self._free_at_s = 0.0
        self._lock = threading.Lock()

    def due_s(self, num_bytes: int, now_s: float) -> float:
        """When the last of these bytes arrives, by the clock of ``now_s``."""
        with self._lock:
            self._free_at_s = max(self._free_at_s, now_s) + num_bytes / self._way.bytes_per_s
            return self._free_at_s + self._way.latency_s

    @property
    def room(self) -> int:
        """Chunks under way at once: what the wire holds, and some for whoever sends."""
        return 4 + int(self._way.bytes_per_s * self._way.latency_s / _CHUNK_BYTES)


class _Relay:
    def __init__(self, plan: RelayPlan) -> None:
        self._plan = plan
        self._pacers: dict[str, Pacer] = {}
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
        answerer.settimeout(None)
        for end in (dialler, answerer):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        there, back = self._pacer(source, host.name), self._pacer(host.name, source)
        _Pump(dialler, answerer, there).start()
        _Pump(answerer, dialler, back).start()

    def _pacer(self, source: str | None, target: str | None) -> Pacer | None:
        if source is None or target is None:
            return None
        name = way_name(source, target)
        if name not in self._pacers:
            self._pacers[name] = Pacer(self._plan.ways.get(name, self._plan.other))
        return self._pacers[name]

    def _who(self, port: int) -> str | None:
        """The agent whose process, or whose worker, dialled from this port."""
        with TcpSockets() as sockets:
            inodes = {f"socket:[{one.inode}]" for one in sockets.of_state(CONNECTED) if one.port == port}
        # Agents were started by whoever started this.
        for process in psutil.Process(os.getppid()).children(recursive=True):
            if not inodes.isdisjoint(_open_files(process.pid)):
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


class _Pump:
    """One direction of a connection: a thread that reads, and one that sends when it is time."""

    def __init__(self, source: socket.socket, target: socket.socket, pacer: Pacer | None) -> None:
        self._source, self._target, self._pacer = source, target, pacer
        self._due: queue.Queue[tuple[float, bytes]] = queue.Queue(maxsize=64 if pacer is None else pacer.room)

    def start(self) -> None:
        for work in (self._read, self._send):
            threading.Thread(target=work, daemon=True).start()

    def _read(self) -> None:
        while True:
            try:
                data = self._source.recv(_CHUNK_BYTES)
            except OSError:
                data = b""
            now_s = time.monotonic()
            self._due.put((now_s if self._pacer is None else self._pacer.due_s(len(data), now_s), data))
            if not data:
                return

    def _send(self) -> None:
        is_open = True
        while True:
            due_s, data = self._due.get()
            if (wait_s := due_s - time.monotonic()) > 0:
                time.sleep(wait_s)
            try:
                if not data:
                    return self._target.shutdown(socket.SHUT_WR)
                if is_open:
                    self._target.sendall(data)
            except OSError:
                if not data:
                    return
                # The other end is gone: who sends is told so, and what still comes is dropped.
                is_open = False
                _end(self._source)


def _end(end: socket.socket) -> None:
    with contextlib.suppress(OSError):  # not connected any more
        end.shutdown(socket.SHUT_RDWR)
    end.close()


def main() -> None:
    """Carry on until SIGTERM."""
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    relay = _Relay(RelayPlan.from_json(Path(sys.argv[1]).read_text(encoding="utf-8")))
    with TcpSockets() as sockets:
        while not ended.wait(_LOOK_EVERY_S):
            relay.look(sockets)


if __name__ == "__main__":
    main()
