"""Shadows: copies of a stage's training state, uploaded beside the computation.

The snapshot is taken between two updates; serialising and sending it happens on a thread of its own, so that a step
waits only for the copy. One upload at a time; a newer snapshot waits for the older one.
"""

from __future__ import annotations

import hashlib
import logging
import queue
import threading
import time
from collections.abc import Callable

from safetensors.torch import save as save_safetensors
from torch import Tensor

from plutino.wire.bulk import BulkClient
from plutino.errors import PlutinoError
from plutino.types import WorkerRef
from protos import workers_pb2 as pb

logger = logging.getLogger(__name__)


class ShadowWriter:
    """Uploads snapshots in order and reports each one that lies safe."""

    def __init__(self, worker: WorkerRef, bulk: BulkClient, on_stored: Callable[[pb.ShadowStored], None]) -> None:
        self._worker = worker
        self._bulk = bulk
        self._on_stored = on_stored
        self._waiting: queue.Queue[tuple[int, dict[str, Tensor]] | None] = queue.Queue(maxsize=2)
        self._thread = threading.Thread(target=self._run, name="shadows", daemon=True)
        self._thread.start()

    def write(self, step: int, snapshot: dict[str, Tensor]) -> None:
        """Queue a snapshot of the state after ``step`` steps; waits while two are queued already."""
        self._waiting.put((step, snapshot))

    def close(self) -> None:
        """Finish what is queued, within a bound."""
        self._waiting.put(None)
        self._thread.join(timeout=10.0)

    def _run(self) -> None:
        while (entry := self._waiting.get()) is not None:
            step, snapshot = entry
            try:
                self._store(step, snapshot)
            except PlutinoError as error:
                # A step without a shadow is not durable; training goes on and the next shadow is a new chance.
                logger.warning("shadow of step %d was not stored: %s", step, error)

    def _store(self, step: int, snapshot: dict[str, Tensor]) -> None:
        started_s = time.monotonic()
        data = save_safetensors(snapshot)
        sha256 = hashlib.sha256(data).hexdigest()
        worker = self._worker
        shadow_id = f"step{step}-epoch{worker.plan_epoch}-stage{worker.stage_index}-{worker.replica_index}"
        self._bulk.put_shadow(worker.job_id, shadow_id, data, sha256)
        names = sorted(name.removeprefix("param/") for name in snapshot if name.startswith("param/"))
        self._on_stored(
            pb.ShadowStored(
                step=step,
                shadow_id=shadow_id,
                sha256=sha256,
                bytes=len(data),
                seconds=time.monotonic() - started_s,
                parameter_names=names,
            )
        )
