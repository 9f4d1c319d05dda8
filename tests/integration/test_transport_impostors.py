"""Frames that no honest peer sends: each is counted under its reason, and none reaches a stage."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import grpc
import pytest
import torch

from edge_node.transport.base import MessageKind
from edge_node.transport.peer import PeerTransport
from edge_node.transport.streams import DialledStream
from plutino.errors import PeerLostError
from plutino.wire.frames import AckFrame, encode_frame, encode_header
from plutino.wire.messages import Ack, DType, MessageHeader, Origin, TensorSpec, job_hash
from plutino.wire.tensors import codec_named, describe, pack
from tests.integration.transport_pairs import (
    HIGH,
    LOW,
    STEP,
    forward,
    hidden_of,
    make_transport,
)


@pytest.fixture
def run() -> Iterator[Callable[..., Future]]:
    """Runs a function in a thread of its own."""
    with ThreadPoolExecutor(8) as executor:
        yield executor.submit


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
