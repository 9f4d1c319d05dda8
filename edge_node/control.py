"""The worker's outbound control stream: it dials, says where it stands, and dials again when the stream breaks.

A worker outlives its coordinator. Events that the coordinator must not miss are kept under a key and sent again after
every reconnect until :meth:`ControlStream.forget` is called; the coordinator takes repeated ones as one.
"""

from __future__ import annotations

import logging
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator

import grpc

from plutino.wire.channel import Lane, sync_channel
from protos import workers_pb2 as pb
from protos import workers_pb2_grpc

logger = logging.getLogger(__name__)

ORPHANED_AFTER_S = 600.0
"""Without a coordinator for this long, a worker ends and gives its memory back to the device's owner."""
_BACKOFF_S = (0.1, 1.0)


class ControlStream:
    """Sends events and hands commands to a callback, across reconnects."""

    def __init__(
        self,
        address: str,
        *,
        hello: Callable[[], pb.WorkerHello],
        on_command: Callable[[pb.WorkerCommand], None],
        on_orphaned: Callable[[], None],
    ) -> None:
        self._address = address
        self._hello = hello
        self._on_command = on_command
        self._on_orphaned = on_orphaned
        self._kept: dict[str, pb.WorkerEvent] = {}
        self._outgoing: queue.SimpleQueue[pb.WorkerEvent | None] = queue.SimpleQueue()
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
            self._outgoing.put(event)

    def forget(self, keep_as: str) -> None:
        """Stop sending a kept event again."""
        with self._lock:
            self._kept.pop(keep_as, None)

    def close(self, *, drain_s: float = 2.0) -> None:
        """Send what is queued, within a bound, and end the stream."""
        self._closing.set()
        self._outgoing.put(None)
        self._thread.join(timeout=drain_s)

    def _run(self) -> None:
        last_contact_s = time.monotonic()
        backoff_s = _BACKOFF_S[0]
        while not self._closing.is_set():
            outgoing = self._fresh_queue()
            channel = sync_channel(self._address, Lane.CONTROL)
            try:
                stub = workers_pb2_grpc.WorkerServiceStub(channel)
                for command in stub.Work(self._events(outgoing)):
                    last_contact_s = time.monotonic()
                    backoff_s = _BACKOFF_S[0]
                    self._on_command(command)
            except grpc.RpcError as error:
                logger.info("control stream to %s broke: %s", self._address, error)
            finally:
                outgoing.put(None)
                channel.close()
            if time.monotonic() - last_contact_s > ORPHANED_AFTER_S:
                self._on_orphaned()
                return
            self._closing.wait(backoff_s * random.uniform(0.5, 1.0))
            backoff_s = min(2 * backoff_s, _BACKOFF_S[1])

    def _fresh_queue(self) -> queue.SimpleQueue[pb.WorkerEvent | None]:
        with self._lock:
            self._outgoing = queue.SimpleQueue()
            self._outgoing.put(pb.WorkerEvent(hello=self._hello()))
            for event in self._kept.values():
                self._outgoing.put(event)
            return self._outgoing

    @staticmethod
    def _events(outgoing: queue.SimpleQueue[pb.WorkerEvent | None]) -> Iterator[pb.WorkerEvent]:
        while (event := outgoing.get()) is not None:
            yield event
