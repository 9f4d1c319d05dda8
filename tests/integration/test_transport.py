from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import grpc
import pytest
import torch

from edge_node.transport.base import MessageKey, MessageKind, Peer, Transport, UnitCancelledError
from edge_node.transport.in_process import InProcessHub
from edge_node.transport.peer import PeerTransport
from edge_node.transport.streams import DialledStream
from plutino.errors import PeerLostError, SecurityError, StaleFrameError
from plutino.types import JobId, Unit, UnitKind
from plutino.wire.frames import (
    Ack,
    AckFrame,
    DType,
    MessageHeader,
    Origin,
    TensorSpec,
    encode_frame,
    encode_header,
    job_hash,
)
from plutino.wire.tensors import codec_named, describe, pack
from tests.integration.tcp_proxy import TcpProxy

STEP = Unit(UnitKind.TRAIN, 1)
NEXT_STEP = Unit(UnitKind.TRAIN, 2)
LOW, HIGH = Peer(0), Peer(1)


def forward(micro_batch: int, unit: Unit = STEP) -> MessageKey:
    return MessageKey(MessageKind.FORWARD, unit, micro_batch)


def backward(micro_batch: int, unit: Unit = STEP) -> MessageKey:
    return MessageKey(MessageKind.BACKWARD, unit, micro_batch)


def hidden_of(micro_batch: int, num_elements: int = 1000) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(micro_batch)
    return {"hidden": torch.randn(num_elements, generator=generator), "lengths": torch.tensor([micro_batch])}


def make_transport(own: Peer, **options: object) -> PeerTransport:
    return PeerTransport(JobId("job-1"), 1, own, **options)


def connect_all(transports: dict[Peer, PeerTransport], reach: dict[Peer, str] | None = None) -> None:
    addresses = {peer: transport.address for peer, transport in transports.items()} | (reach or {})
    with ThreadPoolExecutor(len(transports)) as executor:
        list(executor.map(lambda transport: transport.connect(addresses, timeout_s=10), transports.values()))


@pytest.fixture
def run() -> Iterator[Callable[..., Future]]:
    """Runs a function in a thread of its own."""
    with ThreadPoolExecutor(8) as executor:
        yield executor.submit


@pytest.fixture
def peers() -> Iterator[dict[Peer, PeerTransport]]:
    transports = {peer: make_transport(peer) for peer in (LOW, HIGH)}
    connect_all(transports)
    yield transports
    for transport in transports.values():
        transport.close()


@pytest.fixture
def proxied() -> Iterator[tuple[dict[Peer, PeerTransport], TcpProxy]]:
    transports = {peer: make_transport(peer) for peer in (LOW, HIGH)}
    proxy = TcpProxy(transports[HIGH].address)
    connect_all(transports, {HIGH: proxy.address})
    yield transports, proxy
    for transport in transports.values():
        transport.close()
    proxy.close()


@pytest.fixture(params=["in process", "over gRPC"])
def ends(request: pytest.FixtureRequest) -> Iterator[dict[Peer, Transport]]:
    """What both transports must do alike."""
    if request.param == "in process":
        hub = InProcessHub()
        transports = {peer: hub.transport(peer) for peer in (LOW, HIGH)}
    else:
        transports = {peer: make_transport(peer) for peer in (LOW, HIGH)}
        connect_all(transports)
    yield transports
    for transport in transports.values():
        transport.close()


@pytest.mark.parametrize("codec", ["raw", "bf16"])
def test_transport_delivers_values_dtype_and_shape(ends: dict[Peer, Transport], codec: str) -> None:
    hidden = torch.randn(2, 3, 5, requires_grad=True)

    ends[LOW].send(HIGH, forward(0), {"hidden": hidden, "mask": torch.tensor([True, False])}, codec=codec)
    received = ends[HIGH].receive(LOW, forward(0))

    expected = hidden.detach() if codec == "raw" else hidden.detach().bfloat16().float()
    assert torch.equal(received["hidden"], expected)
    assert not received["hidden"].requires_grad
    assert received["mask"].tolist() == [True, False]


def test_transport_gives_messages_by_key_in_any_order(ends: dict[Peer, Transport]) -> None:
    ends[LOW].send(HIGH, forward(0), hidden_of(0))
    ends[LOW].send(HIGH, forward(0, NEXT_STEP), hidden_of(1))

    early = ends[HIGH].receive(LOW, forward(0, NEXT_STEP))
    due = ends[HIGH].receive(LOW, forward(0))

    assert (early["lengths"].item(), due["lengths"].item()) == (1, 0)


def test_transport_cancel_wakes_a_receiver(ends: dict[Peer, Transport], run: Callable[..., Future]) -> None:
    waiting = run(ends[HIGH].receive, LOW, forward(0))

    ends[HIGH].cancel(STEP)

    with pytest.raises(UnitCancelledError):
        waiting.result(5)


def test_transport_cancel_wakes_a_sender_that_waits_for_room(
    ends: dict[Peer, Transport], run: Callable[..., Future]
) -> None:
    def send_many() -> None:
        for micro_batch in range(20):
            ends[LOW].send(HIGH, forward(micro_batch), hidden_of(micro_batch))

    sending = run(send_many)
    ends[LOW].cancel(STEP)

    with pytest.raises(UnitCancelledError):
        sending.result(5)


def test_transport_drops_what_comes_of_a_unit_that_the_receiver_cancelled(ends: dict[Peer, Transport]) -> None:
    ends[HIGH].cancel(STEP)

    for micro_batch in range(20):
        ends[LOW].send(HIGH, forward(micro_batch), hidden_of(micro_batch))
    ends[LOW].send(HIGH, forward(0, NEXT_STEP), hidden_of(7))

    assert ends[HIGH].receive(LOW, forward(0, NEXT_STEP))["lengths"].item() == 7


def test_transport_drops_what_comes_of_a_finished_unit_and_earlier_ones(ends: dict[Peer, Transport]) -> None:
    ends[HIGH].finish(NEXT_STEP)

    for micro_batch in range(10):
        ends[LOW].send(HIGH, forward(micro_batch), hidden_of(0))
        ends[LOW].send(HIGH, forward(micro_batch, NEXT_STEP), hidden_of(0))
    ends[LOW].send(HIGH, forward(0, Unit(UnitKind.EVALUATE, 1)), hidden_of(7))

    assert ends[HIGH].receive(LOW, forward(0, Unit(UnitKind.EVALUATE, 1)))["lengths"].item() == 7
    with pytest.raises(StaleFrameError):
        ends[HIGH].receive(LOW, forward(0))


def test_transport_send_blocks_at_its_bound_until_a_message_is_taken(
    ends: dict[Peer, Transport], run: Callable[..., Future]
) -> None:
    # 2 queued and 4 in the receiver's inbox over gRPC; 2 in the receiver's inbox in process.
    num_sendable = 6 if isinstance(ends[LOW], PeerTransport) else 2
    num_sent = threading.Semaphore(0)

    def send_all() -> None:
        for micro_batch in range(20):
            ends[LOW].send(HIGH, forward(micro_batch), hidden_of(micro_batch))
            num_sent.release()

    sending = run(send_all)

    assert all(num_sent.acquire(timeout=5) for _ in range(num_sendable))
    assert not num_sent.acquire(timeout=0.1)
    values = [ends[HIGH].receive(LOW, forward(number))["lengths"].item() for number in range(20)]
    sending.result(5)
    assert values == list(range(20))


def test_transport_close_wakes_own_receiver_and_the_peers(
    ends: dict[Peer, Transport], run: Callable[..., Future]
) -> None:
    own = run(ends[HIGH].receive, LOW, forward(0))

    ends[HIGH].close()

    with pytest.raises(PeerLostError):
        own.result(5)


@pytest.mark.parametrize("num_elements", [100, 700_000])
def test_chain_of_three_moves_many_messages_both_ways_with_equal_bits(
    run: Callable[..., Future], num_elements: int
) -> None:
    chain = [Peer(0), Peer(1), Peer(2)]
    num_messages = 40 if num_elements == 100 else 5
    transports = {peer: make_transport(peer) for peer in chain}
    connect_all(transports)

    def relay(own: Peer) -> list[float]:
        transport = transports[own]
        sums = []
        for number in range(num_messages):
            if own != chain[0]:
                tensors = transport.receive(Peer(own.stage_index - 1), forward(number))
            else:
                tensors = hidden_of(number, num_elements)
            if own != chain[-1]:
                transport.send(Peer(own.stage_index + 1), forward(number), tensors)
                tensors = transport.receive(Peer(own.stage_index + 1), backward(number))
            if own != chain[0]:
                transport.send(Peer(own.stage_index - 1), backward(number), tensors)
            sums.append(torch.equal(tensors["hidden"], hidden_of(number, num_elements)["hidden"]))
        transport.finish(STEP)
        return sums

    results = [future.result(20) for future in [run(relay, peer) for peer in chain]]

    assert results == [[True] * num_messages] * 3
    for transport in transports.values():
        assert not any(transport.counters.values())
        transport.close()


def test_stream_cut_again_and_again_mid_unit_delivers_exactly_once(
    proxied: tuple[dict[Peer, PeerTransport], TcpProxy], run: Callable[..., Future]
) -> None:
    transports, proxy = proxied
    num_messages = 24

    def send_all() -> None:
        for number in range(num_messages):
            transports[LOW].send(HIGH, forward(number), hidden_of(number, 200_000))

    sending = run(send_all)
    for number in range(num_messages):
        if number % 8 == 4:
            proxy.cut()
        received = transports[HIGH].receive(LOW, forward(number))
        transports[HIGH].send(LOW, backward(number), received)
        returned = transports[LOW].receive(HIGH, backward(number))
        assert torch.equal(returned["hidden"], hidden_of(number, 200_000)["hidden"])

    sending.result(10)
    assert proxy.num_connections > 1


def test_frame_corrupted_on_its_way_is_counted_and_comes_again(
    proxied: tuple[dict[Peer, PeerTransport], TcpProxy],
) -> None:
    transports, proxy = proxied
    marked = {"x": torch.full((64,), 0x5A, dtype=torch.uint8)}
    proxy.replace_once(b"\x5a" * 16, b"\x5a" * 15 + b"\x5b")

    transports[LOW].send(HIGH, forward(0), marked)
    received = transports[HIGH].receive(LOW, forward(0))

    assert torch.equal(received["x"], marked["x"])
    assert transports[HIGH].counters["corrupt"] == 1


class Impostor:
    """Stands at the low end of a pair and sends the frames that a test wants."""

    def __init__(self, address: str, *, job: str = "job-1", plan_epoch: int = 1, stage_index: int = 0) -> None:
        self.origin = Origin(job_hash(job), plan_epoch, stage_index, 0)
        self._frames: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.stream = DialledStream(address, AckFrame(self.origin, Ack(0, 4)))
        self.stream.open(iter(self._frames.get, None))

    def frame(self, number: int, *, origin: Origin | None = None, specs: tuple[TensorSpec, ...] | None = None) -> bytes:
        tensors = hidden_of(number)
        honest_specs = describe(tensors, codec_named("raw"))
        header = MessageHeader(
            origin=origin or self.origin,
            kind=MessageKind.FORWARD,
            unit=STEP,
            micro_batch=number,
            position=0,
            sequence=number,
            tensors=specs or honest_specs,
        )
        payload = pack(honest_specs, tensors)
        return encode_frame(encode_header(header), Ack(0, 4), index=0, num_chunks=1, offset_bytes=0, payload=payload)

    def send(self, *frames: bytes) -> None:
        for frame in frames:
            self._frames.put(frame)

    def wait_for_end(self) -> None:
        with pytest.raises(grpc.RpcError):
            list(self.stream.frames())

    def close(self) -> None:
        self._frames.put(None)
        self.stream.cancel()


@pytest.fixture
def attacked(run: Callable[..., Future]) -> Iterator[PeerTransport]:
    """A worker of stage 1 that expects stage 0, and will meet an impostor instead."""
    with make_transport(HIGH, reconnect_s=1.0) as transport:
        connecting = run(transport.connect, {LOW: "127.0.0.1:1"}, timeout_s=2)
        yield transport
        transport.close()
        assert connecting.exception(5) is None or isinstance(connecting.exception(), PeerLostError)


OTHER_ORIGINS = {
    "stale_job": Origin(job_hash("job-2"), 1, 0, 0),
    "stale_epoch": Origin(job_hash("job-1"), 0, 0, 0),
    "unknown_sender": Origin(job_hash("job-1"), 1, 5, 0),
}


@pytest.mark.parametrize("reason", list(OTHER_ORIGINS))
def test_frame_of_another_origin_is_counted_and_passed_over(attacked: PeerTransport, reason: str) -> None:
    impostor = Impostor(attacked.address)

    impostor.send(impostor.frame(1, origin=OTHER_ORIGINS[reason]), impostor.frame(1))
    received = attacked.receive(LOW, forward(1))

    assert torch.equal(received["hidden"], hidden_of(1)["hidden"])
    assert {name: count for name, count in attacked.counters.items() if count} == {reason: 1}
    impostor.close()


def test_frame_sent_twice_is_counted_and_delivered_once(attacked: PeerTransport) -> None:
    impostor = Impostor(attacked.address)

    impostor.send(impostor.frame(1), impostor.frame(1), impostor.frame(2))
    attacked.receive(LOW, forward(2))

    assert {name: count for name, count in attacked.counters.items() if count} == {"duplicate": 1}
    impostor.close()


@pytest.mark.parametrize(
    ("reason", "spoil"),
    [
        ("corrupt", lambda frame: frame[:-1] + bytes([frame[-1] ^ 1])),
        ("truncated", lambda frame: frame[:-1]),
        ("malformed", lambda frame: b"XXXX" + frame[4:]),
        ("malformed", lambda frame: frame + b"\0"),
    ],
)
def test_spoilt_frame_ends_the_stream_and_never_reaches_the_inbox(
    attacked: PeerTransport, reason: str, spoil: Callable[[bytes], bytes]
) -> None:
    impostor = Impostor(attacked.address)

    impostor.send(spoil(impostor.frame(1)))
    impostor.wait_for_end()
    again = Impostor(attacked.address)
    again.send(again.frame(1))

    assert attacked.receive(LOW, forward(1))["lengths"].item() == 1
    assert {name: count for name, count in attacked.counters.items() if count} == {reason: 1}
    impostor.close()
    again.close()


def test_frame_that_claims_a_tebibyte_ends_the_stream(attacked: PeerTransport) -> None:
    impostor = Impostor(attacked.address)
    giant = TensorSpec("hidden", DType.FLOAT32, (1 << 20, 1 << 18))

    impostor.send(impostor.frame(1, specs=(giant,)))
    impostor.wait_for_end()

    assert attacked.counters["oversized"] == 1
    impostor.close()


def test_frame_beyond_the_credit_ends_the_stream(attacked: PeerTransport) -> None:
    impostor = Impostor(attacked.address)

    impostor.send(*(impostor.frame(number) for number in range(1, 6)))
    impostor.wait_for_end()

    assert attacked.counters["uncredited"] == 1
    impostor.close()


@pytest.mark.parametrize("reason", list(OTHER_ORIGINS))
def test_stream_of_another_origin_is_refused_and_counted(attacked: PeerTransport, reason: str) -> None:
    origin = OTHER_ORIGINS[reason]
    job = "job-2" if reason == "stale_job" else "job-1"
    impostor = Impostor(attacked.address, job=job, plan_epoch=origin.plan_epoch, stage_index=origin.stage_index)

    with pytest.raises(grpc.RpcError, match="FAILED_PRECONDITION"):
        impostor.stream.peer_hello()

    assert attacked.counters[reason] == 1
    impostor.close()


def test_peer_that_sends_only_rubbish_is_lost(attacked: PeerTransport) -> None:
    for _ in range(8):
        impostor = Impostor(attacked.address)
        impostor.send(b"rubbish")
        impostor.wait_for_end()
        impostor.close()

    with pytest.raises(PeerLostError, match="shorter than a frame's prefix"):
        attacked.receive(LOW, forward(1))


def test_peer_that_is_gone_for_good_is_lost_to_receivers_senders_and_the_callback(run: Callable[..., Future]) -> None:
    lost: queue.SimpleQueue[tuple[Peer, str]] = queue.SimpleQueue()
    transports = {
        LOW: make_transport(LOW, reconnect_s=0.3, on_peer_lost=lambda *what: lost.put(what)),
        HIGH: make_transport(HIGH),
    }
    connect_all(transports)
    waiting = run(transports[LOW].receive, HIGH, backward(0))

    transports[HIGH].close()

    with pytest.raises(PeerLostError, match=r"stage 1\.0 is lost"):
        waiting.result(10)
    assert lost.get(timeout=5)[0] == HIGH
    with pytest.raises(PeerLostError):
        transports[LOW].send(HIGH, forward(0), hidden_of(0))
    transports[LOW].close()


def test_message_that_came_before_its_sender_was_lost_can_still_be_taken(run: Callable[..., Future]) -> None:
    transports = {LOW: make_transport(LOW), HIGH: make_transport(HIGH, reconnect_s=0.2)}
    connect_all(transports)
    transports[LOW].send(HIGH, forward(0), hidden_of(0))
    transports[LOW].send(HIGH, forward(1), hidden_of(1))
    transports[HIGH].receive(LOW, forward(1))

    transports[LOW].close()
    with pytest.raises(PeerLostError):
        run(transports[HIGH].receive, LOW, forward(2)).result(10)

    assert transports[HIGH].receive(LOW, forward(0))["lengths"].item() == 0
    transports[HIGH].close()


def test_connect_to_nobody_names_the_peer_and_its_address() -> None:
    with make_transport(LOW) as transport, pytest.raises(PeerLostError, match=r"stage 1\.0 at 127\.0\.0\.1:1 is lost"):
        transport.connect({HIGH: "127.0.0.1:1"}, timeout_s=0.3)


def test_transport_does_not_listen_beyond_loopback() -> None:
    with pytest.raises(SecurityError):
        make_transport(LOW, listen_address="0.0.0.0:0")


def test_close_ends_every_thread_of_the_transport() -> None:
    transports = {peer: make_transport(peer) for peer in (LOW, HIGH)}
    connect_all(transports)
    assert any(thread.name.startswith("plutino-send") for thread in threading.enumerate())

    for transport in transports.values():
        transport.close()

    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("plutino-")]
    assert left == []


def test_usage_counts_bytes_of_both_ends_alike(peers: dict[Peer, PeerTransport]) -> None:
    peers[LOW].send(HIGH, forward(0), hidden_of(0, 500_000))

    peers[HIGH].receive(LOW, forward(0))

    assert peers[HIGH].usage.received_bytes == peers[LOW].usage.sent_bytes > 2_000_000


def test_pairs_are_dialled_by_the_lower_end(proxied: tuple[dict[Peer, PeerTransport], TcpProxy]) -> None:
    _, proxy = proxied

    assert proxy.num_connections == 1
