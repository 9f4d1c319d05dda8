"""The control stream against a coordinator of its own, over real gRPC on loopback."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc

from edge_node.control import ORPHANED_AFTER_S, ControlStream
from plutino.wire.channel import Lane, bind, sync_server
from protos import workers_pb2 as pb
from protos import workers_pb2_grpc

WAIT_S = 10.0
WELCOME = pb.WorkerCommand(welcome=pb.WorkerWelcome(incarnation=1))


class FakeCoordinator(workers_pb2_grpc.WorkerServiceServicer):
    """Keeps what comes, welcomes every stream, and ends the newest one when told or when its requests end."""

    def __init__(self) -> None:
        self.events: queue.Queue[pb.WorkerEvent] = queue.Queue()
        self.ends_with_requests = True
        self._end = threading.Event()

    def Work(self, request_iterator, context) -> Iterator[pb.WorkerCommand]:
        self._end = end = threading.Event()

        def read() -> None:
            try:
                for event in request_iterator:
                    self.events.put(event)
            except grpc.RpcError:
                return  # the stream broke; the worker dials again
            if self.ends_with_requests:
                end.set()

        context.add_callback(end.set)
        threading.Thread(target=read, daemon=True).start()
        yield WELCOME
        end.wait()

    def end_stream(self) -> None:
        self._end.set()

    def next_kinds(self, count: int) -> list[str]:
        return [self.events.get(timeout=WAIT_S).WhichOneof("event") for _ in range(count)]


class FakeClock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@contextmanager
def coordinator(address: str = "127.0.0.1:0") -> Iterator[tuple[FakeCoordinator, str, grpc.Server]]:
    fake = FakeCoordinator()
    pool = ThreadPoolExecutor(4)
    server = sync_server(Lane.CONTROL, pool)
    workers_pb2_grpc.add_WorkerServiceServicer_to_server(fake, server)
    address = bind(server, address)
    server.start()
    try:
        yield fake, address, server
    finally:
        server.stop(0).wait(WAIT_S)
        pool.shutdown()


@contextmanager
def stream_to(address: str, **options) -> Iterator[tuple[ControlStream, queue.Queue[pb.WorkerCommand]]]:
    commands: queue.Queue[pb.WorkerCommand] = queue.Queue()
    options = {"on_command": commands.put, "on_orphaned": lambda: None} | options
    stream = ControlStream(address, hello=lambda: pb.WorkerHello(next_step=4), **options)
    stream.start()
    try:
        yield stream, commands
    finally:
        stream.close(drain_s=WAIT_S)
        assert not stream._thread.is_alive()


def loaded() -> pb.WorkerEvent:
    return pb.WorkerEvent(loaded=pb.StageLoaded(tensors_read=3))


def step_ready(step: int) -> pb.WorkerEvent:
    return pb.WorkerEvent(step_ready=pb.StepReady(step=step))


def test_stream_says_hello_first_and_hands_on_commands():
    with coordinator() as (fake, address, _), stream_to(address) as (stream, commands):
        stream.send(loaded())

        hello = fake.events.get(timeout=WAIT_S)
        assert hello.hello.next_step == 4
        assert fake.next_kinds(1) == ["loaded"]
        assert commands.get(timeout=WAIT_S) == WELCOME


def test_stream_sends_kept_events_again_after_a_reconnect_and_forgotten_ones_not():
    with coordinator() as (fake, address, _), stream_to(address) as (stream, _):
        stream.send(loaded(), keep_as="loaded")
        stream.send(step_ready(1), keep_as="step_ready")
        stream.send(pb.WorkerEvent(links_up=pb.LinksUp()), keep_as="links_up")
        stream.send(step_ready(2), keep_as="step_ready")
        assert fake.next_kinds(5) == ["hello", "loaded", "step_ready", "links_up", "step_ready"]
        stream.forget("links_up")

        fake.end_stream()

        hello, first, second = (fake.events.get(timeout=WAIT_S) for _ in range(3))
        assert (hello.WhichOneof("event"), first) == ("hello", loaded())
        assert second == step_ready(2)
    assert fake.events.empty()


def test_stream_finds_a_coordinator_that_was_restarted():
    with coordinator() as (_, address, server), stream_to(address) as (stream, commands):
        commands.get(timeout=WAIT_S)
        stream.send(loaded(), keep_as="loaded")
        server.stop(0).wait(WAIT_S)

        with coordinator(address) as (restarted, _, _):
            assert restarted.next_kinds(2) == ["hello", "loaded"]


def test_stream_without_a_coordinator_is_orphaned_after_its_time_limit():
    orphaned, clock = threading.Event(), FakeClock()
    with stream_to("127.0.0.1:1", on_orphaned=orphaned.set, orphaned_after_s=5.0, clock=clock):
        assert not orphaned.is_set()

        clock.now_s = 5.1

        assert orphaned.wait(WAIT_S)


def test_stream_that_was_silent_for_long_is_not_orphaned_when_it_breaks():
    """A paused job's coordinator says nothing for hours; its restart must find the worker alive."""
    orphaned, clock = threading.Event(), FakeClock()
    with (
        coordinator() as (fake, address, _),
        stream_to(address, on_orphaned=orphaned.set, clock=clock) as (_, commands),
    ):
        commands.get(timeout=WAIT_S)
        assert fake.next_kinds(1) == ["hello"]
        clock.now_s = 10 * ORPHANED_AFTER_S

        fake.end_stream()

        assert fake.next_kinds(1) == ["hello"]
        assert not orphaned.is_set()


def test_stream_close_sends_what_is_queued():
    with coordinator() as (fake, address, _):
        with stream_to(address) as (stream, commands):
            commands.get(timeout=WAIT_S)
            for step in range(20):
                stream.send(step_ready(step))

        assert fake.next_kinds(21) == ["hello", *["step_ready"] * 20]


def test_stream_close_before_the_first_stream_still_tells_of_a_failure():
    """A worker that fails at once: its report was thrown away with the queue of before the first stream."""
    with coordinator() as (fake, address, _):
        stream = ControlStream(address, hello=pb.WorkerHello, on_command=print, on_orphaned=print)
        stream.send(pb.WorkerEvent(failed=pb.WorkerFailed(reason="no such folder")))
        stream.start()

        stream.close(drain_s=WAIT_S)

        assert fake.next_kinds(2) == ["hello", "failed"]


def test_stream_close_ends_a_call_that_the_coordinator_does_not_end():
    with coordinator() as (fake, address, _):
        fake.ends_with_requests = False
        with stream_to(address) as (stream, commands):
            commands.get(timeout=WAIT_S)
            stream.close(drain_s=0.01)

            assert not stream._thread.is_alive()


def test_stream_ends_the_worker_when_a_command_cannot_be_handled(caplog):
    """The thread used to die in silence, and the worker waited for ever."""
    orphaned = threading.Event()

    def refuse(command: pb.WorkerCommand) -> None:
        raise ValueError("9 is not a kind of unit")

    with coordinator() as (_, address, _), stream_to(address, on_command=refuse, on_orphaned=orphaned.set):
        assert orphaned.wait(WAIT_S)
    assert "9 is not a kind of unit" in caplog.text


def test_stream_close_without_a_coordinator_ends_at_once():
    with stream_to("127.0.0.1:1") as (stream, _):
        stream.close(drain_s=WAIT_S)

        assert not stream._thread.is_alive()
