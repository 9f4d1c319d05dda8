"""The training state of a job that moves, handed from device to device beside the coordinator.

A worker that goes on leaves its state in its device's disk cache, named by its sha256, and the agents' cache servers
hand it out (:mod:`edge_node.cache_server`). So each device sends its own part, instead of the coordinator all parts to
everyone. What no device has, or has otherwise than its hash says, comes from the coordinator, which has all of it.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from torch import Tensor

from edge_node.cache import BlobCache
from edge_node.going_on import KeptState, keep_state
from edge_node.shadowing import safetensors_pieces, tensors_in
from edge_node.sources.base import SourceError, WantedTensor
from edge_node.sources.device import DeviceSource
from plutino.errors import PlutinoError
from plutino.job.assignment import RestorePoint, WorkerAssignment
from plutino.safetensors_index import TensorEntry
from plutino.security.tls import Credentials
from plutino.wire.bulk import BulkClient

logger = logging.getLogger(__name__)

KEPT, COORDINATOR = "kept", "coordinator"
"""Places of a state: this process, and who has all states."""


def leave_state(cache: BlobCache, kept: KeptState) -> None:
    """Put a state's file where other devices may fetch it; without room or a cache they ask the coordinator."""
    if not cache.budget_bytes:
        return
    for sha256, tensors in kept.by_sha256.items():
        pieces = safetensors_pieces(tensors)
        try:
            with cache.receive(sha256, sum(piece.nbytes for piece in pieces)) as incoming:
                if incoming.path is None:
                    incoming.restart()
                    for piece in pieces:
                        incoming.write(piece)
                    incoming.publish()
        except PlutinoError as error:
            logger.info("the training state is not left for other devices: %s", error)


class StateHandover:
    """A worker's training state at both ends of its life: what it starts from, and what it leaves at a move.

    Args:
        assignment: whose state it is.
        bulk: has all of it.
        credentials: of this device, for the others.
        cache: the device's, which others may read.
        kept: what this process has of the job's plan before; None: it is new.
    """

    def __init__(
        self,
        assignment: WorkerAssignment,
        bulk: BulkClient,
        credentials: Credentials | None,
        cache: BlobCache,
        kept: KeptState | None,
    ) -> None:
        self._assignment = assignment
        self._bulk = bulk
        self._credentials = credentials
        self._cache = cache
        self._kept: Mapping[str, Mapping[str, Tensor]] = {} if kept is None else kept.by_sha256
        self._left = tuple(self._kept)
        self.went_on = kept is not None
        """The process ran the plan before."""
        self.bytes_by_place: Counter[str] = Counter()
        """Where the state came from: this process, a device, the coordinator."""

    def leave(self, snapshot: Mapping[str, Tensor]) -> KeptState:
        """Keep what was trained, and put it where the other devices of the job may fetch it."""
        kept = keep_state(self._assignment.job_id, snapshot)
        has_others = sum(stage.num_replicas for stage in self._assignment.stages) > 1
        # All replicas of a stage hold the same.
        if has_others and self._assignment.replica_index == 0:
            leave_state(self._cache, kept)
        return kept

    def let_go(self) -> None:
        """The worker has its state: what was kept need not be in memory twice."""
        self._kept = {}

    def close(self) -> None:
        """Nobody reads any more what was left before this worker began."""
        for sha256 in self._left:
            self._cache.remove(sha256)

    def read(self, point: RestorePoint, names: Collection[str]) -> dict[str, Tensor]:
        """The state of these parameters, by the names that shadows have, with what else their shadows hold.

        Raises:
            PlutinoError: the coordinator does not give what no device has.
        """
        tensors: dict[str, Tensor] = {}
        job_id, credentials = self._assignment.job_id, self._credentials
        caches = self._assignment.caches if point.is_left_on_devices else ()
        sources = [DeviceSource(cache, job_id, credentials) for cache in caches]
        try:
            # What is here first: then the others' may not be needed.
            for shadow_id, sha256 in sorted(point.shadows.items(), key=lambda item: item[1] not in self._kept):
                if all(f"param/{name}" in tensors for name in names):
                    break
                if (own := self._kept.get(sha256)) is not None:
                    tensors |= own
                    self.bytes_by_place[KEPT] += sum(tensor.nbytes for tensor in own.values())
                    continue
                data = self._from_devices(sources, shadow_id, sha256, point.sizes_bytes.get(shadow_id, 0))
                if data is None:
                    data = self._bulk.get_shadow(job_id, shadow_id, sha256)
                    self.bytes_by_place[COORDINATOR] += len(data)
                tensors |= tensors_in(data)
        finally:
            for source in sources:
                source.close()
        return tensors

    def _from_devices(
        self, sources: Sequence[DeviceSource], shadow_id: str, sha256: str, num_bytes: int
    ) -> bytearray | None:
        entry = TensorEntry(file="", dtype="U8", shape=(num_bytes,), start=0, end=num_bytes)
        wanted = WantedTensor(name=shadow_id, entry=entry, sha256=sha256)
        for source in sources:
            if not source.holds(wanted):
                continue
            data, end = bytearray(num_bytes), 0
            try:
                for chunk in source.stream(wanted, 0):
                    start, end = end, end + len(chunk)
                    if end > num_bytes:
                        raise SourceError(f"{source.name} sends more than the state's {num_bytes} bytes")
                    data[start:end] = chunk
            except SourceError as error:
                logger.warning("the training state %s comes from elsewhere: %s", shadow_id, error)
                continue
            if hashlib.sha256(data).hexdigest() == sha256:
                self.bytes_by_place[source.name] += len(data)
                return data
            logger.warning("the training state %s of %s is damaged", shadow_id, source.name)
        return None
