"""Tensors from the coordinator's bulk process, which has them all."""

from __future__ import annotations

from collections.abc import Iterator

from edge_node.sources.base import SourceError, WantedTensor
from plutino.errors import PlutinoError
from plutino.wire.bulk import STALLED_AFTER_S, BulkClient


class CoordinatorSource:
    """Byte ranges of the model that the coordinator offers to a job.

    Args:
        bulk: client of the bulk process; stays the caller's.
        job_id: the job.
        stalled_after_s: silence after which a transfer is given up.
    """

    name = "coordinator"

    def __init__(self, bulk: BulkClient, job_id: str, *, stalled_after_s: float = STALLED_AFTER_S) -> None:
        self._bulk = bulk
        self._job_id = job_id
        self._stalled_after_s = stalled_after_s

    def holds(self, wanted: WantedTensor) -> bool:
        """Always."""
        return True

    def stream(self, wanted: WantedTensor, offset: int) -> Iterator[memoryview]:
        """See :class:`edge_node.sources.base.ByteSource`."""
        entry = wanted.entry
        try:
            yield from self._bulk.stream_range(
                self._job_id, entry.file, entry.start + offset, entry.end, stalled_after_s=self._stalled_after_s
            )
        except PlutinoError as error:
            raise SourceError(f"the coordinator: {error}") from error

    def close(self) -> None:
        """Nothing: the client is the caller's."""
