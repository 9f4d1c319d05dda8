"""Shadows: copies of a stage's training state, uploaded beside the computation.

The snapshot is taken between two updates; sending it happens on a thread of its own, so that a step waits only for the
copy. One upload at a time; a newer snapshot waits for the older one, and a second one makes its writer wait. A shadow
that could not be stored is tried again until a newer one takes its place: a step without its shadow is not durable,
but training goes on.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from plutino.errors import PlutinoError
from plutino.types import WorkerRef
from protos import workers_pb2 as pb

logger = logging.getLogger(__name__)

_RETRY_S = (1.0, 30.0)
_DTYPE_NAMES = {torch.float32: "F32"}
_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}


class ShadowStorage(Protocol):
    """What keeps shadows: :class:`plutino.wire.bulk.BulkClient`."""

    def put_shadow(self, job_id: str, shadow_id: str, data: Sequence[memoryview], sha256: str) -> None:
        """Store a shadow; when this returns it lies safe. Storing the same one twice is harmless.

        Raises:
            PlutinoError: it was not stored.
        """


class ShadowWriter:
    """Uploads snapshots in order and reports each one that lies safe.

    Args:
        worker: whose state it is.
        bulk: where shadows go.
        on_stored: called on the upload thread for each shadow that lies safe.
        retry_s: pause after the first failure, and the bound up to which it doubles.
    """

    def __init__(
        self,
        worker: WorkerRef,
        bulk: ShadowStorage,
        on_stored: Callable[[pb.ShadowStored], None],
        *,
        retry_s: tuple[float, float] = _RETRY_S,
    ) -> None:
        self._worker = worker
        self._bulk = bulk
        self._on_stored = on_stored
        self._retry_s = retry_s
        self._changed = threading.Condition()
        self._waiting: tuple[int, dict[str, Tensor]] | None = None
        self._is_closing = False
        self._fault: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="shadows", daemon=True)
        self._thread.start()

    def write(self, step: int, snapshot: dict[str, Tensor]) -> None:
        """Queue a snapshot of the state after ``step`` steps; waits while another one is queued already.

        Raises:
            Exception: whatever made the upload thread end; no shadow would ever be stored again.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._waiting is None or self._fault is not None or self._is_closing)
            if self._fault is not None:
                raise self._fault
            self._waiting = (step, snapshot)
            self._changed.notify_all()

    def close(self, *, drain_s: float = 10.0) -> None:
        """Finish what is queued, within a bound; nothing is tried a second time any more."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        self._thread.join(timeout=drain_s)
        if self._thread.is_alive():
            logger.warning("a shadow was still being uploaded after %.0f s; it is given up", drain_s)

    def _run(self) -> None:
        try:
            while (entry := self._next()) is not None:
                self._store_or_give_way(*entry)
        except Exception as error:
            # Whoever writes the next shadow must not wait for a thread that has ended.
            logger.exception("shadows cannot be stored any more")
            with self._changed:
                self._fault = error
                self._changed.notify_all()

    def _next(self) -> tuple[int, dict[str, Tensor]] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting is not None or self._is_closing)
            entry, self._waiting = self._waiting, None
            self._changed.notify_all()
            return entry

    def _store_or_give_way(self, step: int, snapshot: dict[str, Tensor]) -> None:
        """Try until it is stored, a newer snapshot waits, or the end."""
        pause_s, longest_pause_s = self._retry_s
        while True:
            try:
                self._store(step, snapshot)
                return
            except PlutinoError as error:
                logger.warning("the shadow of step %d was not stored: %s", step, error)
            with self._changed:
                if self._changed.wait_for(lambda: self._waiting is not None or self._is_closing, timeout=pause_s):
                    return
            pause_s = min(2 * pause_s, longest_pause_s)

    def _store(self, step: int, snapshot: Mapping[str, Tensor]) -> None:
        started_s = time.monotonic()
        pieces = safetensors_pieces(snapshot)
        digest = hashlib.sha256()
        for piece in pieces:
            digest.update(piece)
        sha256 = digest.hexdigest()
        worker = self._worker
        shadow_id = f"step{step}-epoch{worker.plan_epoch}-stage{worker.stage_index}-{worker.replica_index}"
        self._bulk.put_shadow(worker.job_id, shadow_id, pieces, sha256)
        names = sorted(name.removeprefix("param/") for name in snapshot if name.startswith("param/"))
        self._on_stored(
            pb.ShadowStored(
                step=step,
                shadow_id=shadow_id,
                sha256=sha256,
                bytes=sum(piece.nbytes for piece in pieces),
                seconds=time.monotonic() - started_s,
                parameter_names=names,
            )
        )


def safetensors_pieces(tensors: Mapping[str, Tensor]) -> list[memoryview]:
    """A safetensors file of fp32 tensors as consecutive pieces, without a copy of any tensor.

    safetensors' own ``save`` would double the snapshot, and the plan has room for one.
    """
    header: dict[str, object] = {}
    contents: list[memoryview] = []
    end = 0
    for name, tensor in tensors.items():
        content = tensor.detach().contiguous().cpu().numpy().reshape(-1).data.cast("B")
        start, end = end, end + content.nbytes
        header[name] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        contents.append(content)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [memoryview(len(text).to_bytes(8, "little") + text), *contents]


def tensors_in(file: bytearray) -> dict[str, Tensor]:
    """The tensors of a file of :func:`safetensors_pieces`, where they lie in it.

    safetensors' own ``load`` wants bytes, and copies: three times a state would stand in memory.
    """
    header_bytes = int.from_bytes(file[:8], "little")
    header = json.loads(file[8 : 8 + header_bytes])
    found = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        flat = torch.empty(0, dtype=torch.float32)
        if end > start:
            flat = torch.frombuffer(
                file, dtype=_DTYPES[entry["dtype"]], count=(end - start) // 4, offset=8 + header_bytes + start
            )
        found[name] = flat.view(entry["shape"])
    return found
