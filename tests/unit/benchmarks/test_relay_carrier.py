from __future__ import annotations

import os
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from benchmarks.relay_carrier import Pacer, Way, hand_over
from benchmarks.relay_use import RelayUse, read_use, use_note, write_use

WAIT_S = 20.0
pytestmark = pytest.mark.skipif(not hasattr(select, "epoll"), reason="Linux alone")


def test_a_link_carries_one_thing_after_the_other_and_each_later_by_its_latency():
    pacer = Pacer(Way(bytes_per_s=1000.0, latency_s=0.5))

    assert pacer.due_s(1000, now_s=10.0) == pytest.approx(11.5)
    assert pacer.due_s(1000, now_s=10.0) == pytest.approx(12.5)
    assert pacer.due_s(0, now_s=20.0) == pytest.approx(20.5)


def test_what_waited_for_the_carrier_goes_on_as_if_it_had_been_read_in_time_but_a_long_stop_is_not_made_good():
    pacer = Pacer(Way(bytes_per_s=1000.0, latency_s=0.5))
    pacer.due_s(1000, now_s=10.0)

    assert pacer.due_s(10, now_s=11.03, has_waited=True) == pytest.approx(11.51)
    assert pacer.due_s(10, now_s=11.03) == pytest.approx(11.54)
    assert pacer.due_s(10, now_s=20.0, has_waited=True) == pytest.approx(20.46)


@pytest.mark.parametrize("mbit", [10, 100, 1000])
def test_more_is_read_ahead_than_the_wire_holds(mbit):
    pacer = Pacer(Way(bytes_per_s=mbit / 8e-6, latency_s=0.01))

    assert pacer.room_bytes >= mbit / 8e-6 * 0.01 + 2 * pacer.chunk_bytes


@pytest.fixture
def control(tmp_path) -> Iterator[socket.socket]:
    own, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-m", "benchmarks.relay_carrier", str(other.fileno()), str(tmp_path / "use"), "0"]
    with subprocess.Popen(command, pass_fds=(other.fileno(),)) as process:
        other.close()
        with own:
            yield own
        try:
            assert process.wait(WAIT_S) == 0
        finally:
            process.kill()


def connection(buffer_bytes: int | None = None) -> tuple[socket.socket, socket.socket]:
    """Who dialled and who answered, of whom the latter receives no more than so much unread."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        if buffer_bytes is not None:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
        one = socket.create_connection(server.getsockname(), timeout=WAIT_S)
        other, _ = server.accept()
    other.settimeout(WAIT_S)
    return one, other


def carried(
    control: socket.socket, name: str, way: Way | None, *, is_two_way: bool = False, buffer_bytes: int | None = None
) -> tuple[socket.socket, socket.socket]:
    """A sender's and a receiver's end, with the carrier between them."""
    (sender, source), (target, receiver) = connection(buffer_bytes), connection(buffer_bytes)
    with source, target:
        source.setblocking(False)
        target.setblocking(False)
        hand_over(control, name, way, source, target)
        if is_two_way:
            hand_over(control, f"back of {name}", way, target, source)
    return sender, receiver


def received(end: socket.socket) -> bytes:
    with end:
        return b"".join(iter(lambda: end.recv(1 << 20), b""))


def test_connections_of_a_way_arrive_whole_in_order_and_together_no_sooner_than_its_rate(control):
    way = Way(bytes_per_s=4e6, latency_s=0.01)
    sent = os.urandom(300_000)
    ends = [carried(control, "a -> b", way) for _ in range(2)]
    quick_sender, quick_receiver = carried(control, "b -> c", None)

    began_s = time.monotonic()
    for sender, _ in ends:
        with sender:
            sender.sendall(sent)
    with quick_sender:
        quick_sender.sendall(sent)
    assert received(quick_receiver) == sent
    assert [received(receiver) for _, receiver in ends] == [sent, sent]
    assert time.monotonic() - began_s >= 0.99 * (2 * len(sent) / way.bytes_per_s + way.latency_s)


def test_who_sends_to_somebody_who_has_gone_is_told_so(control):
    sender, receiver = carried(control, "a -> b", Way(bytes_per_s=1e9, latency_s=0.0))
    receiver.close()

    with sender, pytest.raises((BrokenPipeError, ConnectionResetError)):
        deadline_s = time.monotonic() + WAIT_S
        while time.monotonic() < deadline_s:
            sender.sendall(bytes(1 << 16))


def close_as_if_dead(end: socket.socket) -> None:
    """No goodbye, but a reset."""
    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    end.close()


@pytest.mark.parametrize("close", [socket.socket.close, close_as_if_dead])
@pytest.mark.parametrize("is_two_way", [False, True])
def test_who_waits_for_room_at_somebody_who_goes_is_told_so(control, close, is_two_way):
    way = Way(bytes_per_s=1e8, latency_s=0.0)
    sender, receiver = carried(control, "a -> b", way, is_two_way=is_two_way, buffer_bytes=4096)
    sender.setblocking(False)
    while select.select([], [sender], [], 0.2)[1]:
        sender.send(bytes(1 << 16))

    close(receiver)

    with sender, pytest.raises((BrokenPipeError, ConnectionResetError)):
        sender.settimeout(WAIT_S)
        while True:
            sender.send(bytes(1 << 16))


def test_what_a_dead_sender_sent_does_not_look_whole(control):
    sender, receiver = carried(control, "a -> b", Way(bytes_per_s=1e8, latency_s=0.0), is_two_way=True)
    sender.sendall(b"half of")
    assert receiver.recv(7, socket.MSG_WAITALL) == b"half of"

    close_as_if_dead(sender)

    with receiver, pytest.raises(ConnectionResetError):
        receiver.recv(1)


def test_a_slow_receiver_loses_nothing(control):
    sent = os.urandom(48 << 20)
    sender, receiver = carried(control, "a -> b", Way(bytes_per_s=1e8, latency_s=0.0))
    receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)  # or the kernel lets it grow to tens of MiB
    sender.setblocking(False)
    at = 0
    # Until every buffer on the way is full, nobody receives.
    while at < len(sent) and select.select([], [sender], [], 0.2)[1]:
        at += sender.send(memoryview(sent)[at:])
    assert at < len(sent)
    found = bytearray()
    while len(found) < len(sent):
        while at < len(sent) and select.select([], [sender], [], 0)[1]:
            at += sender.send(memoryview(sent)[at:])
        found += receiver.recv(1 << 20)
    sender.close()
    receiver.close()
    assert found == sent


def test_a_note_says_how_busy_the_carriers_were_between_two_looks(tmp_path):
    path = tmp_path / "relay.use"
    assert read_use(path) == []
    first = RelayUse(processor_s=1.0, busiest_share=0.25, num_bytes=10_000_000, num_late_bytes=0)
    write_use(path, 0, first)
    before = read_use(path)
    write_use(path, 0, RelayUse(processor_s=2.0, busiest_share=0.5, num_bytes=50_000_000, num_late_bytes=0))
    write_use(path, 1, RelayUse(processor_s=1.0, busiest_share=0.3, num_bytes=60_000_000, num_late_bytes=1_000_000))

    assert before == [first]
    assert use_note(before, read_use(path), wall_s=4.0, num_cores=6) == (
        "the links' emulator had 6 processors and 2 processes: 0.50 processors busy, one process at most 50% of a"
        " second; of 100 MB 1.0% went on over 1 ms late"
    )
