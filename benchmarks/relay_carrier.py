"""One process that carries bytes at the pace of links: ``python -m benchmarks.relay_carrier SOCKET_FD USE_FILE ROW``.

:mod:`benchmarks.relay` accepts connections and hands each direction of them over, two descriptors and a way, to the
carrier of that way, so that all connections of a way share its rate within one thread. A single thread waits, reads and
sends: there is no lock and no other thread to wait for, so that a processor carries what its copies let it. A way that
was held up, because this process had to wait for a processor, catches up: a cable would have gone on.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.relay_use import RelayUse, write_use

_LEAST_CHUNK_BYTES, _MOST_CHUNK_BYTES = 16 * 1024, 128 * 1024
_CHUNK_S = 0.002
_AHEAD_S, _LEAST_CHUNKS_AHEAD = 0.004, 2
"""Read beyond what the wire holds, so that a late waking costs nothing."""
_UNPACED_ROOM_BYTES = 1 << 20
_CATCH_UP_S = 0.05
_LATE_S = 0.001
_USE_EVERY_S = 1.0
_MESSAGE_BYTES = 4096
_NO_LINGER = struct.pack("ii", 1, 0)
_TIMER_SLACK_NS = "1000"
"""The kernel's own is 50 us, a tenth of a usual link's latency."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """A link, one way."""

    bytes_per_s: float
    latency_s: float


class Pacer:
    """When what comes may go on: one after the other at the rate, and later by the latency."""

    def __init__(self, way: Way) -> None:
        self._way = way
        self._free_at_s = 0.0

    def due_s(self, num_bytes: int, now_s: float, *, has_waited: bool = False) -> float:
        """When the last of these bytes arrives, by the clock of ``now_s``.

        Args:
            num_bytes: as many as came.
            now_s: when they were read.
            has_waited: they were here before, and only this process did not read them.
        """
        begin_s = now_s - _CATCH_UP_S if has_waited else now_s
        self._free_at_s = max(self._free_at_s, begin_s) + num_bytes / self._way.bytes_per_s
        return self._free_at_s + self._way.latency_s

    @property
    def chunk_bytes(self) -> int:
        """Read at once: two milliseconds' bytes, within limits."""
        return max(_LEAST_CHUNK_BYTES, min(_MOST_CHUNK_BYTES, int(self._way.bytes_per_s * _CHUNK_S)))

    @property
    def room_bytes(self) -> int:
        """Under way at once: what the wire holds, and some for whoever sends."""
        ahead_bytes = max(_LEAST_CHUNKS_AHEAD * self.chunk_bytes, int(self._way.bytes_per_s * _AHEAD_S))
        return ahead_bytes + int(self._way.bytes_per_s * self._way.latency_s)


def hand_over(control: socket.socket, name: str, way: Way | None, source: socket.socket, target: socket.socket) -> None:
    """Give one direction of a connection to the carrier at the other end of ``control``.

    Args:
        control: a sequenced-packet socket.
        name: of the way; directions of one name share its rate.
        way: None: what comes passes at once.
        source: where it comes from; not blocking.
        target: where it goes to; not blocking.

    Raises:
        OSError: the carrier has ended.
    """
    rate = None if way is None else (way.bytes_per_s, way.latency_s)
    socket.send_fds(control, [json.dumps([name, rate]).encode()], [source.fileno(), target.fileno()])


class _Direction:
    """What is under way from one socket to another."""

    def __init__(self, carrier: _Carrier, source: socket.socket, target: socket.socket, pacer: Pacer | None) -> None:
        self._carrier, self._source, self._target, self._pacer = carrier, source, target, pacer
        self._pending: deque[tuple[float, memoryview]] = deque()
        self._num_bytes = 0
        self._chunk_bytes = _MOST_CHUNK_BYTES if pacer is None else pacer.chunk_bytes
        self._room_bytes = _UNPACED_ROOM_BYTES if pacer is None else pacer.room_bytes
        self._is_reset = self._is_held = self._is_blocked = self._was_blocked = False
        carrier.watch(source, select.EPOLLIN, self.read)

    @property
    def due_s(self) -> float | None:
        """When to call :meth:`send`; None: there is nothing to send, or no room for it."""
        return self._pending[0][0] if self._pending and not self._is_blocked else None

    def read(self, *, has_waited: bool = False) -> None:
        """Take what came, until nothing is left or there is no more room."""
        num_read = self._chunk_bytes
        while num_read == self._chunk_bytes and not self._is_held:
            try:
                data = self._source.recv(self._chunk_bytes)
            except BlockingIOError:
                return
            except OSError:
                data, self._is_reset = b"", True
            num_read = len(data)
            now_s = time.monotonic()
            due_s = now_s if self._pacer is None else self._pacer.due_s(num_read, now_s, has_waited=has_waited)
            self._pending.append((due_s, memoryview(data)))
            self._num_bytes += num_read
            self._carrier.has_pending(self)
            self._is_held = self._num_bytes >= self._room_bytes
            if not data or self._is_held:
                self._carrier.forget(self._source)

    def send(self) -> None:
        """Pass on what is due."""
        while self._pending:
            due_s, data = self._pending[0]
            now_s = time.monotonic()
            if due_s > now_s:
                break
            if not data:
                return self._end()
            if (sent := self._try_to_send(data)) == 0:
                return
            self._carrier.count(sent, is_late=now_s - due_s > _LATE_S)
            self._num_bytes -= sent
            if sent == len(data):
                self._pending.popleft()
            else:
                self._pending[0] = (due_s, data[sent:])
        if self._is_held and self._num_bytes < self._room_bytes:
            self._is_held = False
            self._carrier.watch(self._source, select.EPOLLIN, self.read)
            # A cable would have gone on if this process was late, but not if whoever receives was.
            has_waited, self._was_blocked = not self._was_blocked, False
            self.read(has_waited=has_waited)

    def _try_to_send(self, data: memoryview) -> int:
        try:
            return self._target.send(data)
        except BlockingIOError:
            self._is_blocked = self._was_blocked = True
            self._carrier.watch(self._target, select.EPOLLOUT, self._unblock)
            return 0
        except OSError:
            # The other end is gone: who sends is told so, and what is under way is dropped.
            self._carrier.forget(self._source)
            _reset(self._source, socket.SHUT_RDWR)
            self._close()
            return 0

    def _unblock(self) -> None:
        self._carrier.forget(self._target)
        self._is_blocked = False
        # What waited for room is not late by this process's doing.
        now_s = time.monotonic()
        self._pending = deque((max(due_s, now_s), data) for due_s, data in self._pending)
        self._carrier.has_pending(self)
        self.send()

    def _end(self) -> None:
        if self._is_reset:
            # Of reading alone: an end of what is sent would make it look whole.
            _reset(self._target, socket.SHUT_RD)
        else:
            with contextlib.suppress(OSError):  # gone already
                self._target.shutdown(socket.SHUT_WR)
        self._close()

    def _close(self) -> None:
        self._pending.clear()
        self._source.close()
        self._target.close()


def _reset(end: socket.socket, directions: int) -> None:
    """Whoever is at the other end shall be told that this one is gone, once nobody here holds it any more.

    The other direction holds the same socket, maybe in another process; it ends by the shutdown of these directions.

    An ordinary close would not tell a sender without room in the window: no update of it follows a shutdown, and what
    is left of the socket in the kernel answers the sender's probes for a minute.
    """
    with contextlib.suppress(OSError):  # gone already
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        end.shutdown(directions)


class _Carrier:
    def __init__(self, control: socket.socket, use_path: Path, row: int) -> None:
        self._control, self._use_path, self._row = control, use_path, row
        self._epoll = select.epoll()
        self._on_event: dict[int, Callable[[], None]] = {}
        self._pacers: dict[str, Pacer] = {}
        self._sending: set[_Direction] = set()
        self._is_over = False
        self._num_bytes = self._num_late_bytes = 0
        self._busiest_share = 0.0
        self._looked_s, self._looked_processor_s = time.monotonic(), time.process_time()
        self.watch(control, select.EPOLLIN, self._take)

    def watch(self, end: socket.socket, events: int, on_event: Callable[[], None]) -> None:
        self._on_event[end.fileno()] = on_event
        self._epoll.register(end.fileno(), events)

    def forget(self, end: socket.socket) -> None:
        # Closing would not do: other processes hold the same socket.
        if self._on_event.pop(end.fileno(), None) is not None:
            self._epoll.unregister(end.fileno())

    def has_pending(self, direction: _Direction) -> None:
        self._sending.add(direction)

    def count(self, num_bytes: int, *, is_late: bool) -> None:
        self._num_bytes += num_bytes
        self._num_late_bytes += num_bytes if is_late else 0

    def _take(self) -> None:
        message, descriptors, _, _ = socket.recv_fds(self._control, _MESSAGE_BYTES, 2)
        if not message:
            self._is_over = True  # the relay has ended
            return
        name, rate = json.loads(message)
        pacer = None
        if rate is not None:
            pacer = self._pacers.setdefault(name, Pacer(Way(bytes_per_s=rate[0], latency_s=rate[1])))
        source, target = (socket.socket(fileno=descriptor) for descriptor in descriptors)
        _Direction(self, source, target, pacer)

    def run(self) -> None:
        """Carry until the relay ends."""
        while not self._is_over:
            self._wait()
            for descriptor, _ in self._epoll.poll(0):
                # One of the same round may have been forgotten meanwhile.
                if (on_event := self._on_event.get(descriptor)) is not None:
                    on_event()
            for direction in list(self._sending):
                direction.send() if direction.due_s is not None else self._sending.discard(direction)
            self._tell_use()

    def _wait(self) -> None:
        dues = [due_s for direction in self._sending if (due_s := direction.due_s) is not None]
        wait_s = min(min(dues) - time.monotonic(), _USE_EVERY_S) if dues else _USE_EVERY_S
        # epoll's own clock knows milliseconds only.
        select.select([self._epoll], [], [], max(0.0, wait_s))

    def _tell_use(self) -> None:
        now_s = time.monotonic()
        if (took_s := now_s - self._looked_s) < _USE_EVERY_S:
            return
        processor_s = time.process_time()
        self._busiest_share = max(self._busiest_share, (processor_s - self._looked_processor_s) / took_s)
        self._looked_s, self._looked_processor_s = now_s, processor_s
        use = RelayUse(
            processor_s=processor_s,
            busiest_share=self._busiest_share,
            num_bytes=self._num_bytes,
            num_late_bytes=self._num_late_bytes,
        )
        write_use(self._use_path, self._row, use)


def main() -> None:
    """Carry until the relay ends."""
    with contextlib.suppress(OSError):  # latencies are some 50 us longer then
        Path("/proc/self/timerslack_ns").write_text(_TIMER_SLACK_NS)
    _Carrier(socket.socket(fileno=int(sys.argv[1])), Path(sys.argv[2]), int(sys.argv[3])).run()


if __name__ == "__main__":
    main()
