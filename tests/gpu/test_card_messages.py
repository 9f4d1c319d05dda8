"""Messages between a card and the wire: only who needs the bytes waits for the card. Needs a card: ``make gpu``."""

from __future__ import annotations

import pytest
import torch

from edge_node.engine.pass_clock import PassClock
from edge_node.stage.placing import to_device
from plutino.wire.messages import Codec
from plutino.wire.tensors import BufferPool, HostCopy, describe, pack, unpack
from tests.integration.transport_pairs import HIGH, LOW, connect_all, forward, make_transport

pytestmark = pytest.mark.gpu

CARD = torch.device("cuda", 0)


def busy(num_products: int = 50) -> torch.Tensor:
    """What a card computes for a while, queued and not waited for."""
    product = torch.randn(2048, 2048, device=CARD)
    for _ in range(num_products):
        product = torch.tanh(product @ product)
    return product


@pytest.mark.parametrize("codec", [Codec.RAW, Codec.BF16])
def test_host_copy_has_the_bits_of_what_was_queued_before_it(codec):
    hidden = busy().t()
    specs = describe({"hidden": hidden, "lengths": torch.tensor([3])}, codec)

    copy = HostCopy(specs, {"hidden": hidden, "lengths": torch.tensor([3])})
    later = busy()
    found = copy.wait()

    expected = hidden.to(torch.bfloat16) if codec is Codec.BF16 else hidden
    assert torch.equal(found["hidden"], expected.cpu())
    assert b"".join(pack(specs, found)) == b"".join(pack(specs, {"hidden": hidden.cpu(), "lengths": torch.tensor([3])}))
    assert later.isfinite().all()


def test_host_copy_does_not_wait_for_what_is_queued_after_it():
    hidden = torch.randn(1 << 20, device=CARD)
    torch.cuda.synchronize()
    copy = HostCopy(describe({"hidden": hidden}, Codec.RAW), {"hidden": hidden})
    later = busy(400)
    ended = torch.cuda.Event()
    ended.record()

    copy.wait()

    assert not ended.query(), "the message waited for the passes behind it"
    assert later.isfinite().all()


def test_page_locked_memory_is_not_lent_again_while_a_card_copies_from_it():
    pool = BufferPool(is_page_locked=True)
    specs = describe({"x": torch.zeros(1 << 20)}, Codec.RAW)
    on_card = []
    for value in range(16):
        memory = pool.lend(4 << 20)
        memory.numpy().view("float32")[:] = value
        received = unpack(specs, memory)["x"]
        # The copy queues behind the products, while the host goes on to the next message.
        busy(5)
        on_card.append(to_device(received, CARD))
        del memory, received

    assert [tensor.unique().tolist() for tensor in on_card] == [[float(value)] for value in range(16)]


def test_rows_that_share_their_memory_come_to_the_card_each():
    positions_BT = torch.arange(5).expand(3, 5)

    assert torch.equal(to_device(positions_BT, CARD).cpu(), positions_BT)


def test_transports_of_cards_carry_their_tensors_with_equal_bits():
    with make_transport(LOW, is_for_card=True) as low, make_transport(HIGH, is_for_card=True) as high:
        connect_all({LOW: low, HIGH: high})
        for m in range(20):
            hidden = busy(2)[: 1 + 100 * m]
            low.send(HIGH, forward(m), {"hidden": hidden, "lengths": torch.tensor([m])})
            received = high.receive(LOW, forward(m))

            assert received["hidden"].is_pinned()
            assert torch.equal(to_device(received["hidden"], CARD), hidden)


def test_pass_clock_of_a_card_counts_the_cards_seconds_and_not_the_queueing():
    busy(1)
    torch.cuda.synchronize()
    clock, started, ended = PassClock(CARD), torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    started.record()
    clock.start()
    busy(100)
    clock.end()
    ended.record()

    seconds = clock.seconds()
    ended.synchronize()
    assert 0 < seconds <= started.elapsed_time(ended) / 1000
    assert seconds > 0.9 * started.elapsed_time(ended) / 1000
