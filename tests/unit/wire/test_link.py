"""The link's bookkeeping, with frames carried by hand: no gRPC, no threads unless something must block."""

from __future__ import annotations

import threading
from collections import Counter
from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_node.transport.base import MessageKey, MessageKind, Peer, UnitCancelledError
from edge_node.transport.inbox import Inbox
from edge_node.transport.link import Link, StreamToken
from plutino.errors import FrameError, PeerLostError
from plutino.types import Unit, UnitKind
from plutino.wire.messages import Ack, Bounds, Codec, Origin, Refusal, RefusedFrameError
from plutino.wire.tensors import BufferPool

STEP = Unit(UnitKind.TRAIN, 1)


def key(micro_batch: int, unit: Unit = STEP) -> MessageKey:
    return MessageKey(MessageKind.FORWARD, unit, micro_batch)


def hidden(value: float, num_elements: int = 4) -> dict[str, torch.Tensor]:
    return {"hidden": torch.full((num_elements,), float(value))}


class End:
    """One side of a pair."""

    def __init__(self, own: Peer, peer: Peer, bounds: Bounds) -> None:
        self.peer = peer
        self.inbox = Inbox()
        self.refused: Counter[Refusal] = Counter()
        origin = Origin(1, 1, own.stage_index, own.replica_index)
        self.link = Link(origin, peer, self.inbox, bounds, BufferPool(), lambda reason: self.refused.update([reason]))
        self.token = StreamToken(Ack(0, 0))

    def take(self, micro_batch: int) -> float:
        message = self.inbox.take(self.peer, key(micro_batch))
        self.link.release(message.num_bytes)
        return message.tensors["hidden"][0].item()

    def frames(self) -> list[bytes]:
        """What is due now; for messages of one chunk."""
        outgoing = self.link.outgoing_frames(self.token)
        frames = []
        while self.link.has_work:
            frames.append(next(outgoing))
        return frames


class Pair:
    """Two ends and a stream between them that loses what it is told to lose."""

    def __init__(self, bounds: Bounds | None = None) -> None:
        self.left = End(Peer(0), Peer(1), bounds or Bounds())
        self.right = End(Peer(1), Peer(0), bounds or Bounds())
        self.reconnect()

    def reconnect(self) -> None:
        hellos = {end: end.link.hello.ack for end in (self.left, self.right)}
        for end, other in ((self.left, self.right), (self.right, self.left)):
            end.link.detach(end.token)
            end.token = StreamToken(hellos[end])
            end.link.attach(end.token, hellos[other])

    def carry(self) -> None:
        while self.left.link.has_work or self.right.link.has_work:
            for frame in self.left.frames():
                self.right.link.accept(frame)
            for frame in self.right.frames():
                self.left.link.accept(frame)


def test_link_carries_messages_in_both_directions() -> None:
    pair = Pair()
    pair.left.link.send(key(0), hidden(1), Codec.RAW)
    pair.right.link.send(key(0), hidden(2), Codec.RAW)

    pair.carry()

    assert pair.right.take(0) == 1.0
    assert pair.left.take(0) == 2.0


@given(events=st.lists(st.sampled_from(["send", "carry", "lose frames", "lose acks", "cut", "take"]), max_size=40))
@settings(max_examples=60, deadline=None)
def test_link_delivers_exactly_once_and_in_order_whatever_streams_lose(events: list[str]) -> None:
    pair = Pair(Bounds(max_message_bytes=64, max_inbox_bytes=192, max_inbox_messages=3))
    num_sent, num_queued, taken = 0, 0, []

    def take_arrived() -> None:
        while pair.right.inbox.num_waiting(Peer(0), MessageKind.FORWARD):
            taken.append(pair.right.take(len(taken)))

    for event in [*events, "cut", *["carry", "take"] * 8]:
        num_queued = num_sent - pair.right.link.progress[0]
        if event == "send" and num_queued < 2:
            pair.left.link.send(key(num_sent), hidden(num_sent), Codec.RAW)
            num_sent += 1
        elif event == "carry":
            pair.carry()
        elif event == "lose frames":
            pair.left.frames()
            pair.reconnect()
        elif event == "lose acks":
            for frame in pair.left.frames():
                pair.right.link.accept(frame)
            pair.right.frames()
            pair.reconnect()
        elif event == "cut":
            pair.reconnect()
        elif event == "take":
            take_arrived()

    assert taken == [float(number) for number in range(num_sent)]
    assert not pair.right.refused


def test_link_holds_no_more_of_a_peer_than_its_credit() -> None:
    pair = Pair()
    blocked = threading.Event()

    def send_all() -> None:
        for number in range(12):
            pair.left.link.send(key(number), hidden(number), Codec.RAW)
        blocked.set()

    sender = threading.Thread(target=send_all)
    sender.start()
    while pair.right.inbox.num_waiting(Peer(0), MessageKind.FORWARD) < 4:
        pair.carry()

    assert not blocked.wait(0.1)
    pair.carry()
    assert pair.right.inbox.num_waiting(Peer(0), MessageKind.FORWARD) == 4
    values = []
    while len(values) < 12:
        pair.carry()
        while pair.right.inbox.num_waiting(Peer(0), MessageKind.FORWARD):
            values.append(pair.right.take(len(values)))
    sender.join(5)
    assert values == [float(number) for number in range(12)]


def test_link_credit_counts_messages_on_their_way_at_the_largest_size() -> None:
    pair = Pair(Bounds(max_message_bytes=1000, max_inbox_bytes=2500, max_inbox_messages=4))

    assert pair.right.link.hello.ack.credit_through == 2


def test_link_refuses_a_message_it_gave_no_credit_for() -> None:
    pair = Pair(Bounds(max_inbox_messages=1))
    pair.left.link.attach(pair.left.token, Ack(0, 99))
    for number in range(2):
        pair.left.link.send(key(number), hidden(number), Codec.RAW)
    first, second = pair.left.frames()
    pair.right.link.accept(first)

    with pytest.raises(RefusedFrameError):
        pair.right.link.accept(second)

    assert pair.right.refused == {Refusal.UNCREDITED: 1}


def test_link_counts_a_repeated_message_and_delivers_it_once() -> None:
    pair = Pair()
    pair.left.link.send(key(0), hidden(1), Codec.RAW)
    (frame,) = pair.left.frames()

    pair.right.link.accept(frame)
    pair.right.link.accept(frame)

    assert pair.right.refused == {Refusal.DUPLICATE: 1}
    assert pair.right.take(0) == 1.0


def test_link_refuses_a_gap_in_the_numbers() -> None:
    pair = Pair()
    for number in range(2):
        pair.left.link.send(key(number), hidden(number), Codec.RAW)

    with pytest.raises(RefusedFrameError, match="message 2 came after message 0"):
        pair.right.link.accept(pair.left.frames()[1])


def test_link_refuses_a_chunk_out_of_turn_and_recovers_on_the_next_stream() -> None:
    pair = Pair()
    pair.left.link.send(key(0), hidden(7, num_elements=600_000), Codec.RAW)
    frames = list(islice(pair.left.link.outgoing_frames(pair.left.token), 3))

    pair.right.link.accept(frames[0])
    with pytest.raises(RefusedFrameError, match="out of turn"):
        pair.right.link.accept(frames[2])
    pair.reconnect()
    for frame in islice(pair.left.link.outgoing_frames(pair.left.token), 3):
        pair.right.link.accept(frame)

    assert pair.right.take(0) == 7.0


@pytest.mark.parametrize("end_unit", ["cancel", "finish"])
def test_link_drops_messages_of_an_ended_unit_and_gives_their_credit_back(end_unit: str) -> None:
    pair = Pair()
    getattr(pair.right.inbox, end_unit)(STEP)

    for number in range(9):
        pair.left.link.send(key(number), hidden(number), Codec.RAW)
        pair.carry()

    assert pair.right.refused == {Refusal.STALE_UNIT: 9}
    assert pair.right.inbox.num_waiting(Peer(0), MessageKind.FORWARD) == 0


def test_link_lets_go_of_acknowledged_tensors_after_a_flush() -> None:
    pair = Pair()
    pair.left.link.send(key(0), hidden(1), Codec.RAW)
    pair.carry()
    assert pair.left.link.progress == (0, 0)

    pair.right.link.flush()
    pair.carry()

    assert pair.left.link.progress == (0, 1)


def test_link_loses_a_peer_that_forgot_what_it_had_received() -> None:
    pair = Pair()
    pair.left.link.send(key(0), hidden(1), Codec.RAW)
    pair.carry()
    pair.right.link.flush()
    pair.carry()

    with pytest.raises(PeerLostError, match="started anew"):
        pair.left.link.attach(StreamToken(Ack(0, 4)), Ack(0, 4))


def test_link_refuses_to_send_what_no_receiver_would_take() -> None:
    pair = Pair(Bounds(max_message_bytes=15))

    with pytest.raises(FrameError, match="use smaller micro-batches"):
        pair.left.link.send(key(0), hidden(1), Codec.RAW)


def test_link_send_that_waits_for_room_wakes_on_cancel() -> None:
    pair = Pair()
    raised: list[Exception] = []

    def send_until_raised() -> None:
        try:
            for number in range(3):
                pair.left.link.send(key(number), hidden(number), Codec.RAW)
        except UnitCancelledError as error:
            raised.append(error)

    sender = threading.Thread(target=send_until_raised)
    sender.start()
    pair.left.inbox.cancel(STEP)
    pair.left.link.drop_queued(STEP)
    sender.join(5)

    assert len(raised) == 1
