"""What a transport owes the stages that use it, in process and over gRPC, on streams that break."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch

from edge_node.transport.base import Peer, Transport, UnitCancelledError
from edge_node.transport.in_process import InProcessHub
from edge_node.transport.peer import PeerTransport
from plutino.errors import PeerLostError, SecurityError, StaleFrameError
from plutino.types import Unit, UnitKind
from tests.integration.tcp_proxy import TcpProxy
from tests.integration.transport_pairs import (
    HIGH,
    LOW,
    NEXT_STEP,
    STEP,
    backward,
    connect_all,
    forward,
    hidden_of,
    make_transport,
)


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
