"""Client of the bulk process: model files in, shadows out and in, for workers and runners.

Calls are retried while the bulk process does not answer, a bounded number of times; a read goes on from the byte it
had reached. Every deadline grows with the size of the transfer, and no more is allocated than was asked for.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import TypeVar

import grpc
from google.protobuf.message import Message

from plutino.errors import FrameError, UnreachableError
from plutino.security.tls import Credentials
from plutino.sizes import GIB, KIB, MIB, format_size
from plutino.wire.channel import Lane, RenewedChannel
from plutino.wire.chunks import CHUNK_BYTES, ChunkCall, StallWatch, call_for_chunks
from plutino.wire.status import error_from_rpc
from protos import bulk_pb2, bulk_pb2_grpc

Buffer = bytes | bytearray | memoryview

STALLED_AFTER_S = 20.0
"""A transfer in which nothing comes for so long is given up."""

MAX_MANIFEST_BYTES = 64 * MIB
"""A model of 128 experts in 96 blocks has 37 000 tensors of 180 bytes each in its manifest."""

_SERVICE = bulk_pb2.DESCRIPTOR.services_by_name["BulkService"]

_Result = TypeVar("_Result")


class BulkClient:
    """Blocking client; one channel, safe to share between threads."""

    def __init__(
        self,
        address: str,
        credentials: Credentials | None = None,
        *,
        num_attempts: int = 6,
        base_deadline_s: float = 30.0,
        slowest_bytes_per_s: int = 256 * KIB,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        """A transfer of n bytes is given ``base_deadline_s + n / slowest_bytes_per_s`` seconds an attempt.

        Raises:
            ConfigError: the address is malformed.
            SecurityError: the address is not on loopback, and there are no credentials.
        """
        self._address = address
        self._num_attempts = num_attempts
        self._base_deadline_s = base_deadline_s
        self._slowest_bytes_per_s = slowest_bytes_per_s
        self._sleep = sleep
        self._channel = RenewedChannel(address, Lane.BULK, credentials)

    @property
    def _stub(self) -> bulk_pb2_grpc.BulkServiceStub:
        return bulk_pb2_grpc.BulkServiceStub(self._channel.current())

    def __enter__(self) -> BulkClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the channel; calls in flight fail."""
        self._channel.close()

    def put_shadow(self, job_id: str, shadow_id: str, data: Buffer | Sequence[Buffer], sha256: str) -> None:
        """Store a shadow; when this returns it is verified and synced to disk. Storing it twice is harmless.

        ``data`` is the file, whole or as consecutive pieces; it is read again for every attempt.

        Raises:
            FrameError: the bytes do not have this sha256.
            JobError: the id holds other bytes already, the shadow passes the bound, or the disk is full.
            UnreachableError: the bulk process did not answer.
        """
        pieces = [memoryview(data)] if isinstance(data, Buffer) else [memoryview(piece) for piece in data]
        pieces = [piece.cast("B") for piece in pieces]
        total_bytes = sum(len(piece) for piece in pieces)

        def requests() -> Iterator[bulk_pb2.PutShadowRequest]:
            yield bulk_pb2.PutShadowRequest(job_id=job_id, shadow_id=shadow_id, sha256=sha256, total_bytes=total_bytes)
            for piece in pieces:
                for start in range(0, len(piece), CHUNK_BYTES):
                    yield bulk_pb2.PutShadowRequest(data=bytes(piece[start : start + CHUNK_BYTES]))

        def attempt() -> None:
            self._stub.PutShadow(requests(), timeout=self._deadline_s(total_bytes))

        self._retry(attempt)

    def get_shadow(self, job_id: str, shadow_id: str, sha256: str, *, max_bytes: int = 16 * GIB) -> bytearray:
        """Fetch a shadow and check it.

        Raises:
            FrameError: it is larger than ``max_bytes``, or its bytes do not have the expected sha256.
            UnknownJobError: there is no such shadow.
            UnreachableError: the bulk process did not answer.
        """
        request = bulk_pb2.GetShadowRequest(job_id=job_id, shadow_id=shadow_id)

        def attempt() -> bytearray:
            call = self._chunks("GetShadow", request, self._deadline_s(max_bytes))
            # The size is known only once the server has answered, so the real deadline is set then.
            with _Watchdog(call, self._base_deadline_s):
                total_bytes = _total_bytes(call.initial_metadata())
            if total_bytes is None:
                # The call failed before it announced a size; reading it raises why.
                next(call, None)
                raise FrameError(f"{self._address} did not tell the size of shadow {shadow_id}")
            if total_bytes > max_bytes:
                call.cancel()
                raise FrameError(
                    f"shadow {shadow_id} has {format_size(total_bytes)}, allowed are {format_size(max_bytes)}"
                )
            received = bytearray(total_bytes)
            with _Watchdog(call, self._deadline_s(total_bytes)):
                target = _Target(memoryview(received))
                target.fill_from(call)
            target.require_full(f"shadow {shadow_id}")
            return received

        received = self._retry(attempt)
        found = hashlib.sha256(received).hexdigest()
        if found != sha256:
            raise FrameError(f"shadow {shadow_id} of job {job_id} arrived with sha256 {found}, expected {sha256}")
        return received

    def stream_range(
        self, job_id: str, file_name: str, start_byte: int, end_byte: int, *, stalled_after_s: float = STALLED_AFTER_S
    ) -> Iterator[memoryview]:
        """Bytes ``[start_byte, end_byte)`` of a file of the job's model, as they come; one attempt.

        Raises:
            ConfigError: the file is not served or has no such range.
            UnreachableError: the bulk process did not answer, or sent nothing for ``stalled_after_s``.
        """
        request = bulk_pb2.GetRangeRequest(job_id=job_id, file_name=file_name, start_byte=start_byte, end_byte=end_byte)
        call = self._chunks("GetRange", request, self._deadline_s(end_byte - start_byte))
        yield from stream_chunks(call, self._address, stalled_after_s)

    def read_range(self, job_id: str, file_name: str, start_byte: int, end_byte: int) -> bytearray:
        """Bytes ``[start_byte, end_byte)`` of a file of the job's model; goes on where a broken transfer stopped.

        Raises:
            ConfigError: the file is not served or has no such range.
            FrameError: the server sent fewer or more bytes.
            UnreachableError: the bulk process did not answer.
        """
        received = bytearray(max(0, end_byte - start_byte))
        partly = _Target(memoryview(received))

        def attempt() -> None:
            partly.fill_from(self.stream_range(job_id, file_name, start_byte + partly.filled_bytes, end_byte))

        self._retry(attempt)
        partly.require_full(f"{file_name} from byte {start_byte} on")
        return received

    def manifest(self, job_id: str, sha256: str, *, max_bytes: int = MAX_MANIFEST_BYTES) -> bytes:
        """The manifest of the job's model, checked.

        Raises:
            FrameError: it is larger than ``max_bytes``, or has another sha256.
            UnknownJobError: the job offers no model.
            UnreachableError: the bulk process did not answer.
        """
        request = bulk_pb2.GetManifestRequest(job_id=job_id)

        def attempt() -> bytes:
            received = bytearray()
            call = self._chunks("GetManifest", request, self._deadline_s(max_bytes))
            for chunk in stream_chunks(call, self._address, STALLED_AFTER_S):
                received += chunk
                if len(received) > max_bytes:
                    call.cancel()
                    raise FrameError(f"the manifest of job {job_id} has more than {format_size(max_bytes)}")
            return bytes(received)

        received = self._retry(attempt)
        found = hashlib.sha256(received).hexdigest()
        if found != sha256:
            raise FrameError(
                f"the manifest of job {job_id} arrived with sha256 {found}, expected {sha256}: the model was changed "
                "after the job began; put its files back, or submit the job again"
            )
        return received

    def _chunks(self, method_name: str, request: Message, timeout_s: float) -> ChunkCall:
        return call_for_chunks(self._channel.current(), _SERVICE, method_name, request, timeout_s=timeout_s)

    def _deadline_s(self, num_bytes: int) -> float:
        return self._base_deadline_s + num_bytes / self._slowest_bytes_per_s

    def _retry(self, attempt: Callable[[], _Result]) -> _Result:
        for number in range(1, self._num_attempts + 1):
            try:
                return attempt()
            except UnreachableError:
                if number == self._num_attempts:
                    raise
            except grpc.RpcError as rpc_error:
                error = error_from_rpc(rpc_error, self._address)
                if not isinstance(error, UnreachableError) or number == self._num_attempts:
                    raise error from rpc_error
            self._sleep(min(1.0, 0.1 * 2 ** (number - 1)))
        raise AssertionError("the last attempt returns or raises")


def stream_chunks(call: ChunkCall, address: str, stalled_after_s: float) -> Iterator[memoryview]:
    """The chunks of a call as they come; a call that is not read to its end is cancelled.

    Raises:
        PlutinoError: what the other side met; UnreachableError also if nothing came for ``stalled_after_s``.
    """
    with StallWatch(call, stalled_after_s) as watch:
        try:
            for chunk in call:
                watch.moved()
                yield chunk
                watch.moved()  # what the caller does with a chunk is not the other side's time
        except grpc.RpcError as error:
            if watch.has_stalled:
                raise UnreachableError(f"{address} has sent nothing for {stalled_after_s:.0f} s") from error
            raise error_from_rpc(error, address) from error
        finally:
            call.cancel()


class _Target:
    """A buffer being filled from chunks."""

    def __init__(self, view: memoryview) -> None:
        self._view = view
        self.total_bytes = len(view)
        self.filled_bytes = 0

    def fill_from(self, chunks: Iterable[memoryview]) -> None:
        for chunk in chunks:
            end = self.filled_bytes + len(chunk)
            if end > self.total_bytes:
                raise FrameError(f"more than the {self.total_bytes} bytes asked for came")
            self._view[self.filled_bytes : end] = chunk
            self.filled_bytes = end

    def require_full(self, what: str) -> None:
        if self.filled_bytes != self.total_bytes:
            raise FrameError(f"{what}: {self.filled_bytes} of {self.total_bytes} bytes came; try again")


class _Watchdog:
    """Cancels a call that has not been served within a time."""

    def __init__(self, call: ChunkCall, timeout_s: float) -> None:
        self._timer = threading.Timer(timeout_s, call.cancel)
        self._timer.daemon = True

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()


def _total_bytes(metadata: Sequence[tuple[str, str | bytes]] | None) -> int | None:
    for key, value in metadata or ():
        if key == "total-bytes" and isinstance(value, str) and value.isdecimal():
            return int(value)
    return None
