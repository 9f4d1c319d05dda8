"""The worker's outbound control stream: it dials, says where it stands, and dials again when the stream breaks.

A worker outlives its coordinator. Events that the coordinator must not miss are kept under a key and sent again after
every reconnect until :meth:`ControlStream.forget` is called; the coordinator takes repeated ones as one. Other events
are sent once: one that was handed to a stream which then broke is lost.
"""

from __future__ import annotations

import logging
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc

from plutino.security.tls import Credentials
from plutino.wire.channel import Lane, sync_channel
from protos import workers_pb2 as pb
from protos import workers_pb2_grpc

logger = logging.getLogger(__name__)

ORPHANED_AFTER_S = 600.0
"""Without a coordinator for this long, a worker ends and gives its memory back to the device's owner."""
_BACKOFF_S = (0.1, 1.0)
_CANCEL_S = 1.0


@dataclass(frozen=True, slots=True)
class _Entry:
    event: pb.WorkerEvent
    is_kept: bool


_Outgoing = queue.SimpleQueue[_Entry | None]


class ControlStream:
    """Sends events and hands commands to a callback, across reconnects.

    Args:
        address: the coordinator, ``host:port``.
        hello: gives the first event of every stream.
        on_command: called on the stream's thread for every command.
        on_orphaned: called once if the coordinator is away for longer than ``orphaned_after_s``.
        credentials: who dials; None for a coordinator without TLS on this machine.
        orphaned_after_s: counts from the end of the last stream on which the coordinator said anything.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        address: str,
        *,
        hello: Callable[[], pb.WorkerHello],
        on_command: Callable[[pb.WorkerCommand], None],
        on_orphaned: Callable[[], None],
        credentials: Credentials | None = None,
        orphaned_after_s: float = ORPHANED_AFTER_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._address = address
        self._hello = hello
        self._on_command = on_command
        self._on_orphaned = on_orphaned
        self._credentials = credentials
        self._orphaned_after_s = orphaned_after_s
        self._clock = clock
        self._kept: dict[str, pb.WorkerEvent] = {}
        self._outgoing: _Outgoing = queue.SimpleQueue()
        self._call: Any = None
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="control", daemon=True)

    def start(self) -> None:
        """Begin to dial."""
        self._thread.start()

    def send(self, event: pb.WorkerEvent, *, keep_as: str | None = None) -> None:
        """Send an event; with ``keep_as`` it is sent again after every reconnect, replacing an older one so named."""
        with self._lock:
            if keep_as is not None:
                self._kept[keep_as] = event
            self._outgoing.put(_Entry(event, keep_as is not None))

    def forget(self, keep_as: str) -> None:
        """Stop sending a kept event again."""
        with self._lock:
            self._kept.pop(keep_as, None)

    def close(self, *, drain_s: float = 2.0) -> None:
        """Send what is queued, within a bound, and end the stream."""
        with self._lock:
            self._closing.set()
            self._outgoing.put(None)
        self._thread.join(timeout=drain_s)
        if self._thread.is_alive() and (call := self._call) is not None:
            call.cancel()
            self._thread.join(timeout=_CANCEL_S)

    def _run(self) -> None:
        try:
            self._dial_until_closed()
        except Exception:
            # A command that could not be understood. Without its control stream the worker would wait for ever, and
            # keep the device's memory.
            logger.exception("the control stream ended by a fault")
            self._on_orphaned()

    def _dial_until_closed(self) -> None:
        last_contact_s = self._clock()
        backoff_s = _BACKOFF_S[0]
        while (outgoing := self._fresh_queue()) is not None:
            if self._serve(outgoing):
                # The coordinator may have had nothing to say for hours: it is away only since the stream broke.
                last_contact_s = self._clock()
                backoff_s = _BACKOFF_S[0]
            if self._closing.is_set():
                return
            if self._clock() - last_contact_s > self._orphaned_after_s:
                self._on_orphaned()
                return
            self._closing.wait(backoff_s * random.uniform(0.5, 1.0))
            backoff_s = min(2 * backoff_s, _BACKOFF_S[1])

    def _serve(self, outgoing: _Outgoing) -> bool:
        """Run one stream to its end; True if the coordinator said anything."""
        has_answered = False
        channel = sync_channel(self._address, Lane.CONTROL, self._credentials)
        try:
            self._call = workers_pb2_grpc.WorkerServiceStub(channel).Work(self._events(outgoing))
            for command in self._call:
                has_answered = True
                self._on_command(command)
        except grpc.RpcError as error:
            logger.info("control stream to %s broke: %s", self._address, error)
        finally:
            outgoing.put(None)
            channel.close()
        return has_answered

    def _fresh_queue(self) -> _Outgoing | None:
        """A queue for a new stream, with what the coordinator must hear first; None once there is nothing to say."""
        with self._lock:
            # Kept events that were never sent are among all kept ones, or were replaced.
            unsent = [entry for entry in _drain(self._outgoing) if not entry.is_kept]
            if self._closing.is_set() and not unsent:
                return None
            self._outgoing = queue.SimpleQueue()
            self._outgoing.put(_Entry(pb.WorkerEvent(hello=self._hello()), is_kept=True))
            for event in self._kept.values():
                self._outgoing.put(_Entry(event, is_kept=True))
            for entry in unsent:
                self._outgoing.put(entry)
            if self._closing.is_set():
                self._outgoing.put(None)
            return self._outgoing

    @staticmethod
    def _events(outgoing: _Outgoing) -> Iterator[pb.WorkerEvent]:
        while (entry := outgoing.get()) is not None:
            yield entry.event


def _drain(outgoing: _Outgoing) -> Iterator[_Entry]:
    while not outgoing.empty():
        if (entry := outgoing.get()) is not None:
            yield entry
