"""An agent's weights cache for the other devices of a job: blobs by their sha256, over gRPC. Torch-free.

Only workers of jobs that this device has run may ask, and only for blobs that are here. What they get they check.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc

from edge_node.cache import BlobCache
from edge_node.network import DeviceNetwork
from plutino.errors import ConfigError, PlutinoError, UnknownJobError
from plutino.security.interceptors import IsRevoked, SyncGate, nobody_is_revoked
from plutino.wire.channel import Lane, bind, split_address, sync_server
from plutino.wire.chunks import CHUNK_BYTES, chunk_service
from plutino.wire.status import abort_with
from protos import cache_pb2

logger = logging.getLogger(__name__)

NUM_CALLS = 4
"""Transfers at the same time; the agent stays small."""
MAX_TRANSFER_S = 24 * 3600.0

_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
_STOP_GRACE_S = 0.5


class CacheService:
    """The calls of protos/cache.proto.

    Args:
        cache: the device's.
        serves_job: whether this device has run the job.
    """

    def __init__(self, cache: BlobCache, serves_job: Callable[[str], bool]) -> None:
        self._cache = cache
        self._serves_job = serves_job

    def Holds(self, request: cache_pb2.HoldsRequest, context: grpc.ServicerContext) -> cache_pb2.HoldsResponse:
        """Whether a blob is here; its bytes are not looked at."""
        try:
            self._check(request.job_id, request.sha256)
            return cache_pb2.HoldsResponse(holds=self._cache.find(request.sha256) is not None)
        except PlutinoError as error:
            abort_with(context, error)

    def GetBlob(self, request: cache_pb2.GetBlobRequest, context: grpc.ServicerContext) -> Iterator[bytes]:
        """Stream a blob from a byte on."""
        try:
            left_s = context.time_remaining()
            if left_s is None or left_s > MAX_TRANSFER_S:
                raise ConfigError(f"a transfer needs a deadline of at most {MAX_TRANSFER_S:.0f} s")
            self._check(request.job_id, request.sha256)
            path = self._cache.find(request.sha256)
            if path is None:
                raise ConfigError(f"blob {request.sha256[:12]} is not in this device's cache")
            # Once it is open, eviction does not take it away.
            with path.open("rb", buffering=0) as file:
                file.seek(request.start_byte)
                while data := file.read(CHUNK_BYTES):
                    yield data
        except PlutinoError as error:
            abort_with(context, error)
        except OSError as error:
            logger.warning("a cached blob cannot be read: %s", error)
            abort_with(context, ConfigError(f"blob {request.sha256[:12]} cannot be read here: {error.strerror}"))

    def _check(self, job_id: str, sha256: str) -> None:
        if not _SHA256.fullmatch(sha256):
            raise ConfigError("a blob is named by 64 lower-case hexadecimal digits")
        if not self._serves_job(job_id):
            raise UnknownJobError(f"this device does not run job {job_id[:140]}")


class CacheServer:
    """The service on a port of its own.

    Args:
        cache: the device's.
        network: who this device is and where it listens.
        serves_job: whether this device has run a job.
        is_revoked: whether the coordinator has shut a member out.

    Raises:
        SecurityError: the address is not on loopback, and the device has no identity.
    """

    def __init__(
        self,
        cache: BlobCache,
        network: DeviceNetwork,
        serves_job: Callable[[str], bool],
        is_revoked: IsRevoked = nobody_is_revoked,
    ) -> None:
        credentials = network.credentials()
        self._gate = SyncGate(is_revoked)
        self._server = sync_server(
            Lane.BULK,
            ThreadPoolExecutor(NUM_CALLS, thread_name_prefix="cache"),
            interceptors=[] if credentials is None else [self._gate],
        )
        service = cache_pb2.DESCRIPTOR.services_by_name["CacheService"]
        self._server.add_generic_rpc_handlers((chunk_service(service, CacheService(cache, serves_job)),))
        bound_host, port = split_address(bind(self._server, f"{network.listen_host}:0", credentials))
        self.address = f"{network.advertised_host or bound_host}:{port}"
        """Where other devices dial it."""
        self._server.start()

    def cut_revoked(self) -> None:
        """End the transfers of members that are shut out by now."""
        self._gate.cut_revoked()

    def close(self) -> None:
        """End all transfers and stop listening."""
        self._server.stop(_STOP_GRACE_S).wait(2 * _STOP_GRACE_S)
