"""Tensors from the cache of another device that runs the same job."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import grpc

from edge_node.sources.base import SourceError, WantedTensor
from plutino.errors import PlutinoError
from plutino.job.assignment import DeviceCache
from plutino.security.identity import PeerName, Role
from plutino.security.tls import Credentials
from plutino.wire.bulk import STALLED_AFTER_S, stream_chunks
from plutino.wire.channel import Lane, RenewedChannel
from plutino.wire.chunks import call_for_chunks
from protos import cache_pb2, cache_pb2_grpc

_HOLDS_TIMEOUT_S = 2.0
_HEARS_WITHIN_S = 2.0
_POLL_S = 0.05
_BASE_DEADLINE_S = 30.0
_SLOWEST_BYTES_PER_S = 256 << 10
_SERVICE = cache_pb2.DESCRIPTOR.services_by_name["CacheService"]


class DeviceSource:
    """One other device.

    Args:
        device: which one.
        job_id: the job that both run.
        credentials: this device's; None: in plain, on loopback.
    """

    def __init__(
        self,
        device: DeviceCache,
        job_id: str,
        credentials: Credentials | None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = f"device {device.device_name}"
        self._address = device.address
        self._job_id = job_id
        # Without credentials nobody has a name on the wire.
        peer = PeerName("unnamed" if credentials is None else device.agent_id, Role.NODE)
        self._channel = RenewedChannel(device.address, Lane.BULK, credentials, peer=peer)
        self._is_gone = threading.Event()
        self._clock = clock
        self._knows_job_by_s = clock() + _HEARS_WITHIN_S

    def holds(self, wanted: WantedTensor) -> bool:
        """Whether the device says that it has the tensor; one that does not answer is not asked again."""
        if self._is_gone.is_set():
            return False
        request = cache_pb2.HoldsRequest(job_id=self._job_id, sha256=wanted.sha256)
        stub = cache_pb2_grpc.CacheServiceStub(self._channel.current())
        while True:
            try:
                answer: cache_pb2.HoldsResponse = stub.Holds(request, timeout=_HOLDS_TIMEOUT_S)
                return bool(answer.holds)
            except grpc.RpcError as error:
                is_unknown_job = isinstance(error, grpc.Call) and error.code() == grpc.StatusCode.NOT_FOUND
                if not is_unknown_job:
                    self._is_gone.set()
                    return False
            # All devices of a plan hear of the job within a moment of each other.
            if self._clock() > self._knows_job_by_s:
                return False
            time.sleep(_POLL_S)

    def stream(self, wanted: WantedTensor, offset: int) -> Iterator[memoryview]:
        """See :class:`edge_node.sources.base.ByteSource`."""
        request = cache_pb2.GetBlobRequest(job_id=self._job_id, sha256=wanted.sha256, start_byte=offset)
        timeout_s = _BASE_DEADLINE_S + wanted.num_bytes / _SLOWEST_BYTES_PER_S
        try:
            call = call_for_chunks(self._channel.current(), _SERVICE, "GetBlob", request, timeout_s=timeout_s)
            yield from stream_chunks(call, self._address, STALLED_AFTER_S)
        except PlutinoError as error:
            # Another one has it too: nothing is gained by asking this one again.
            raise SourceError(f"{self.name}: {error}", is_lost=True) from error

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()
