"""How quick the way between two devices is, measured in short bursts over the connection that workers use.

A door (:mod:`plutino.doctor.door`) takes and gives bytes that mean nothing, within bounds; whoever dials it measures.
Entry points: :func:`burst_service` for the door, :func:`measure_link` for the dialler.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc

from plutino.errors import UnreachableError
from plutino.security.identity import COORDINATOR, PeerName
from plutino.security.tls import Credentials
from plutino.wire.channel import Lane, sync_channel

SERVICE = "plutino.v1.BurstService"
MAX_BURST_BYTES = 32 << 20
"""Of one direction: a quarter of a second at 1 Gbit/s."""
MAX_BURST_S = 0.25
"""Of one direction."""
MEASURE_TIMEOUT_S = 5.0
"""A link so slow that two bursts of a few chunks take longer is told as one that did not answer."""

_FIRST_CHUNK_BYTES = 16 << 10
_LAST_CHUNK_BYTES = 256 << 10
_LEAST_WINDOW_BYTES = 64 << 10
_NUM_PINGS = 12
_RAMP_SHARE = 0.25
"""Share of a burst that is left out: TCP and HTTP/2 open their windows in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkFigures:
    """What one dial measured."""

    latency_s: float
    """Half of the shortest round trip of a small message on a stream that is up."""
    up_bytes_per_s: float
    """From the dialler to the door."""
    down_bytes_per_s: float

    @property
    def bandwidth_bytes_per_s(self) -> float:
        """Of the slower direction: hidden states go one way, as many bytes of gradients the other."""
        return min(self.up_bytes_per_s, self.down_bytes_per_s)


def burst_service() -> grpc.GenericRpcHandler[Any, Any]:
    """The calls of a door: ``Take`` says after every chunk how many bytes have come, ``Give`` sends and is told."""
    return grpc.method_handlers_generic_handler(
        SERVICE,
        {
            "Take": grpc.stream_stream_rpc_method_handler(_take, None, None),
            "Give": grpc.stream_stream_rpc_method_handler(_give, None, None),
        },
    )


def _take(chunks: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
    num_bytes = 0
    for chunk in chunks:
        num_bytes += len(chunk)
        if num_bytes > 2 * MAX_BURST_BYTES:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"a burst has at most {MAX_BURST_BYTES} bytes")
        yield _encoded(num_bytes)


def _give(acks: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
    return _burst(lambda: next(acks, None))


def _encoded(num_bytes: int) -> bytes:
    return num_bytes.to_bytes(8, "little")


def _burst(next_ack: Callable[[], bytes | None]) -> Iterator[bytes]:
    """Chunks that grow, with hardly more bytes on their way than have arrived.

    More would stay in the buffers of a slow link for seconds, and be waited for.
    """
    data = bytes(_LAST_CHUNK_BYTES)
    size, sent_bytes, acked_bytes, started_s = _FIRST_CHUNK_BYTES, 0, 0, time.perf_counter()
    while sent_bytes < MAX_BURST_BYTES:
        yield data[:size]
        sent_bytes += size
        size = min(2 * size, _LAST_CHUNK_BYTES)
        while sent_bytes - acked_bytes > _LEAST_WINDOW_BYTES + acked_bytes:
            ack = next_ack()
            if ack is None:
                return
            acked_bytes = int.from_bytes(ack, "little")
        if time.perf_counter() - started_s > MAX_BURST_S:
            return


def measure_link(address: str, *, credentials: Credentials | None = None, peer: PeerName = COORDINATOR) -> LinkFigures:
    """Dial a door and measure the way there and back, in less than a second on a link that is any use.

    Args:
        address: where the door is.
        credentials: who dials; None dials in plain, on loopback only.
        peer: who must answer.

    Raises:
        ConfigError: the address is malformed.
        SecurityError: it is beyond loopback, and there are no credentials.
        UnreachableError: nobody answered, or not in time.
    """
    channel = sync_channel(address, Lane.DATA, credentials, peer=peer)
    deadline_s = time.perf_counter() + MEASURE_TIMEOUT_S
    take: Any = channel.stream_stream(f"/{SERVICE}/Take", None, None)
    give: Any = channel.stream_stream(f"/{SERVICE}/Give", None, None)
    try:
        latency_s = _latency_s(take, deadline_s)
        up = _up(take, deadline_s)
        down = _down(give, deadline_s)
    except grpc.RpcError as error:
        told = error.details() if isinstance(error, grpc.Call) else str(error)
        raise UnreachableError(f"{address} did not answer a burst within {MEASURE_TIMEOUT_S:g} s: {told}") from None
    finally:
        channel.close()
    return LinkFigures(latency_s=latency_s, up_bytes_per_s=rate_of(up), down_bytes_per_s=rate_of(down))


def _left_s(deadline_s: float) -> float:
    return max(0.05, deadline_s - time.perf_counter())


def _up(take: Any, deadline_s: float) -> list[tuple[float, int]]:
    """When how many bytes had arrived at the door."""
    acks: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    arrivals = [(time.perf_counter(), 0)]
    try:
        for ack in take(_burst(acks.get), timeout=_left_s(deadline_s)):
            arrivals.append((time.perf_counter(), int.from_bytes(ack, "little")))
            acks.put(ack)
    finally:
        # A thread of gRPC's may wait for an ack that does not come.
        acks.put(None)
    return arrivals


def _down(give: Any, deadline_s: float) -> list[tuple[float, int]]:
    """When how many bytes had arrived here."""
    acks: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    arrivals = [(time.perf_counter(), 0)]
    try:
        for chunk in give(iter(acks.get, None), timeout=_left_s(deadline_s)):
            arrivals.append((time.perf_counter(), arrivals[-1][1] + len(chunk)))
            acks.put(_encoded(arrivals[-1][1]))
    finally:
        acks.put(None)
    return arrivals


def _latency_s(take: Any, deadline_s: float) -> float:
    """Half of the shortest round trip; the first one sets the connection up and is left out."""
    pings: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    call = take(iter(pings.get, None), timeout=_left_s(deadline_s))
    try:
        shortest_s = float("inf")
        for number in range(_NUM_PINGS + 1):
            sent_s = time.perf_counter()
            pings.put(b"p")
            next(call)
            if number > 0:
                shortest_s = min(shortest_s, time.perf_counter() - sent_s)
        return shortest_s / 2
    finally:
        # The thread of gRPC's that waits for the next ping ends with it, however the call ended.
        pings.put(None)
        call.cancel()


def rate_of(arrivals: list[tuple[float, int]]) -> float:
    """Bytes a second from when and how many bytes had come; the burst's beginning is left out.

    Args:
        arrivals: (seconds, bytes so far) by time, at least two; the first one is the beginning, without bytes.
    """
    (first_s, _), (last_s, last_bytes) = arrivals[0], arrivals[-1]
    ramp_s = first_s + _RAMP_SHARE * (last_s - first_s)
    settled = [arrival for arrival in arrivals[:-1] if arrival[0] >= ramp_s]
    from_s, from_bytes = settled[0] if settled else arrivals[-2]
    return (last_bytes - from_bytes) / max(last_s - from_s, 1e-9)
