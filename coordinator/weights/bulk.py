"""The bulk process: a model's manifest and byte ranges, and shadows, in a process and on a port of their own.

Big transfers here can delay neither a commit nor a lease, which live in the coordinator's process. Started as
``python -m coordinator.weights.bulk``; it prints ``{"address": "127.0.0.1:PORT"}`` as one line and runs until its
standard input ends, it gets SIGTERM, or its parent is no longer the given one. All state is files, so a restart loses
nothing but the transfers in flight, which clients begin again.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc

from coordinator.artifacts.shadows import CHUNK_BYTES, ShadowStore
from coordinator.security.records import SecurityRecords
from coordinator.security.warden import revocations
from coordinator.weights.model_files import ModelFiles, manifest_path
from coordinator.weights.rate import TokenBucket
from plutino.errors import ConfigError, FrameError, JobError, PlutinoError
from plutino.security.interceptors import SyncGate
from plutino.security.tls import Credentials
from plutino.sizes import GIB, format_size
from plutino.wire.channel import Lane, bind, sync_server
from plutino.wire.chunks import chunk_service
from plutino.wire.status import abort_with
from protos import bulk_pb2, bulk_pb2_grpc

logger = logging.getLogger(__name__)

NUM_CALLS = 32
"""Transfers at the same time; further ones wait for a thread."""

DEFAULT_MAX_SHADOW_BYTES = 16 * GIB

MAX_TRANSFER_S = 7 * 24 * 3600

_STOP_GRACE_S = 2.0
_PARENT_CHECK_S = 1.0
_NICENESS = 5


class BulkService(bulk_pb2_grpc.BulkServiceServicer):
    """Serves transfers from files; every byte in either direction passes the one bucket."""

    def __init__(
        self,
        state_dir: Path,
        bucket: TokenBucket,
        *,
        max_shadow_bytes: int = DEFAULT_MAX_SHADOW_BYTES,
        pause: Callable[[float], object],
    ) -> None:
        """``pause`` waits the seconds that the bucket demands; it may return early when the process ends."""
        self._state_dir = state_dir
        self._shadows = ShadowStore(state_dir)
        self._bucket = bucket
        self._max_shadow_bytes = max_shadow_bytes
        self._pause = pause

    def PutShadow(
        self, request_iterator: Iterator[bulk_pb2.PutShadowRequest], context: grpc.ServicerContext
    ) -> bulk_pb2.PutShadowResponse:
        """Store a shadow; answered when it is durable."""
        with _answering_errors(context):
            _require_deadline(context)
            return bulk_pb2.PutShadowResponse(sha256=self._store(request_iterator))

    def GetShadow(self, request: bulk_pb2.GetShadowRequest, context: grpc.ServicerContext) -> Iterator[bytes]:
        """Stream a shadow; initial metadata ``total-bytes`` tells its size."""
        with _answering_errors(context):
            _require_deadline(context)
            path = self._shadows.existing_path(request.job_id, request.shadow_id)
            total_bytes = path.stat().st_size
            context.send_initial_metadata((("total-bytes", str(total_bytes)),))
            yield from self._read(path, 0, total_bytes)

    def GetRange(self, request: bulk_pb2.GetRangeRequest, context: grpc.ServicerContext) -> Iterator[bytes]:
        """Stream a byte range of a file of the job's model."""
        with _answering_errors(context):
            _require_deadline(context)
            model = ModelFiles.of_job(self._shadows.job_dir(request.job_id))
            path = model.check_range(request.file_name, request.start_byte, request.end_byte)
            yield from self._read(path, request.start_byte, request.end_byte)

    def GetManifest(self, request: bulk_pb2.GetManifestRequest, context: grpc.ServicerContext) -> Iterator[bytes]:
        """Stream the manifest of the job's model."""
        with _answering_errors(context):
            _require_deadline(context)
            path = manifest_path(self._shadows.job_dir(request.job_id))
            yield from self._read(path, 0, path.stat().st_size)

    def _store(self, requests: Iterator[bulk_pb2.PutShadowRequest]) -> str:
        first = next(requests, None)
        if first is None:
            raise FrameError("a shadow's upload held no message; send it again")
        job_id, shadow_id, sha256, total_bytes = first.job_id, first.shadow_id, first.sha256, first.total_bytes
        if total_bytes > self._max_shadow_bytes:
            raise JobError(
                f"shadow {shadow_id[:140]} of job {job_id[:140]} has {format_size(total_bytes)}, the bound is "
                f"{format_size(self._max_shadow_bytes)}; raise the bulk process's --max-shadow-bytes"
            )
        if self._shadows.holds(job_id, shadow_id, sha256):
            return sha256
        with self._shadows.receive(job_id, shadow_id, sha256, total_bytes) as incoming:
            incoming.write(first.data)
            self._pause_for(len(first.data))
            for request in requests:
                incoming.write(request.data)
                self._pause_for(len(request.data))
            incoming.publish()
        return sha256

    def _read(self, path: Path, start_byte: int, end_byte: int) -> Iterator[bytes]:
        with path.open("rb", buffering=0) as file:
            file.seek(start_byte)
            left_bytes = end_byte - start_byte
            while left_bytes:
                data = file.read(min(CHUNK_BYTES, left_bytes))
                if not data:
                    raise FrameError(f"{path.name} became shorter while it was sent, {left_bytes} bytes are missing")
                left_bytes -= len(data)
                self._pause_for(len(data))
                yield data

    def _pause_for(self, num_bytes: int) -> None:
        wait_s = self._bucket.take(num_bytes)
        if wait_s > 0:
            self._pause(wait_s)


@contextmanager
def _answering_errors(context: grpc.ServicerContext) -> Iterator[None]:
    """End the call with the status of the error that the block raises."""
    try:
        yield
    except PlutinoError as error:
        logger.warning("refused: %s", error)
        abort_with(context, error)
    except OSError as error:
        logger.exception("a file could not be used")
        abort_with(context, JobError(f"the coordinator's disk failed: {error}; free or repair it, then resume the job"))


def _require_deadline(context: grpc.ServicerContext) -> None:
    # A caller that stops sending or reading would keep a thread for good. gRPC tells of a call without a deadline that
    # it has centuries left.
    left_s = context.time_remaining()
    if left_s is None or left_s > MAX_TRANSFER_S:
        raise ConfigError(f"a bulk transfer needs a deadline of at most {MAX_TRANSFER_S} s")


def serve(
    service: bulk_pb2_grpc.BulkServiceServicer,
    address: str,
    *,
    credentials: Credentials | None = None,
    gate: SyncGate | None = None,
    num_calls: int = NUM_CALLS,
) -> tuple[grpc.Server, str]:
    """Start a server of the service; returns it and where it listens.

    Args:
        service: what answers.
        address: where to listen.
        credentials: the coordinator's; None listens in plain, on loopback only.
        gate: who may call; needed with credentials.
        num_calls: calls at the same time.

    Raises:
        ConfigError: the address is malformed or taken.
        SecurityError: the address is not on loopback, and there are no credentials.
    """
    executor = ThreadPoolExecutor(num_calls, thread_name_prefix="bulk")
    server = sync_server(Lane.BULK, executor, interceptors=[] if gate is None else [gate])
    server.add_generic_rpc_handlers((chunk_service(bulk_pb2.DESCRIPTOR.services_by_name["BulkService"], service),))
    bound = bind(server, address, credentials)
    server.start()
    return server, bound


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bulk process until its parent lets go of it; returns the exit code."""
    options = _parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    # Ctrl-C reaches the whole terminal group; whether to end is the coordinator's decision.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Whoever else wants the processor gets it first: commits and steps do not wait for a transfer that can.
    os.nice(_NICENESS)
    ending = threading.Event()
    try:
        num_swept = ShadowStore(options.state_dir).sweep()
        bucket = TokenBucket(options.rate_bytes_per_s, burst_bytes=CHUNK_BYTES)
        service = BulkService(options.state_dir, bucket, max_shadow_bytes=options.max_shadow_bytes, pause=ending.wait)
        credentials, gate, members = None, None, None
        if options.identity is not None:
            credentials = Credentials(options.identity)
            members = SecurityRecords(options.identity.parent)
            gate = SyncGate(revocations(members))
        server, address = serve(service, options.address, credentials=credentials, gate=gate)
    except PlutinoError as error:
        print(f"bulk: {error}", file=sys.stderr)
        return error.exit_code
    logger.info("serving on %s, %d half-received shadows swept", address, num_swept)
    # Whoever reads the address may end this process at once.
    wake_fd = _catch_sigterm()
    print(json.dumps({"address": address}), flush=True)

    def cut_revoked() -> None:
        if gate is not None:
            gate.cut_revoked()

    reason = _wait_for_end(options.parent_pid, wake_fd, cut_revoked)
    logger.info("ending: %s", reason)
    ending.set()
    server.stop(_STOP_GRACE_S).wait(2 * _STOP_GRACE_S)
    if members is not None:
        members.close()
    return 0


def _catch_sigterm() -> int:
    """From now on SIGTERM only makes the returned descriptor readable."""
    wake_fd, signal_fd = os.pipe()
    os.set_blocking(signal_fd, False)
    signal.set_wakeup_fd(signal_fd)
    signal.signal(signal.SIGTERM, lambda *_: None)
    return wake_fd


def _wait_for_end(parent_pid: int, wake_fd: int, do_now_and_then: Callable[[], None]) -> str:
    """Block until standard input ends, SIGTERM comes or the parent is another process; returns which."""
    stdin_fd = sys.stdin.fileno()
    while os.getppid() == parent_pid:
        readable, _, _ = select.select([stdin_fd, wake_fd], [], [], _PARENT_CHECK_S)
        do_now_and_then()
        if wake_fd in readable:
            return "terminated"
        if stdin_fd in readable and not os.read(stdin_fd, 4096):
            return "standard input ended"
    return f"process {parent_pid} is no longer the parent"


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m coordinator.weights.bulk", description=__doc__)
    parser.add_argument("--address", default="127.0.0.1:0", help="host:port to listen on; port 0 takes a free one")
    parser.add_argument("--state-dir", type=Path, required=True, help="the coordinator's state directory")
    parser.add_argument("--rate-bytes-per-s", type=int, default=0, help="cap on all transfers together; 0: none")
    parser.add_argument("--max-shadow-bytes", type=int, default=DEFAULT_MAX_SHADOW_BYTES)
    parser.add_argument(
        "--identity",
        type=Path,
        default=None,
        help="the coordinator's identity file; without it loopback only, in plain",
    )
    parser.add_argument("--parent-pid", type=int, required=True, help="ends when this is no longer its parent")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
