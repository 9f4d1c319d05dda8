"""A stage's weights from wherever they are nearest, checked, through the device's cache.

For every tensor the places are asked in order: folders on this device, the agent's cache, then the other sources (hub,
devices that run the same job, coordinator) as :mod:`edge_node.sources.order` has them. Whatever gives the bytes, they
must have the sha256 of the manifest. What comes over a link goes to the cache's disk first, several tensors at a time
and ahead of the reading: so the memory beside the stage stays one tensor's, and a broken transfer goes on where it
stopped, also in the next process.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from edge_node.cache import BlobCache, OverBudgetError
from edge_node.sources.base import ByteSource, SourceError, WantedTensor
from edge_node.sources.order import Delivered, order_sources
from edge_node.stage.weights import SafetensorsSource
from plutino.digests import hash_range
from plutino.errors import FrameError, ModelError
from plutino.manifest import Manifest
from plutino.safetensors_index import TensorEntry, read_safetensors_headers

logger = logging.getLogger(__name__)

NUM_STREAMS = 4
"""Tensors obtained at the same time: hides the round trip between two, and hashes on several cores."""
_ATTEMPTS_WITHOUT_PROGRESS = 3
_FIRST_BACKOFF_S = 0.2

FOLDER = "folder"
CACHE = "cache"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the loading of a stage is."""

    done_bytes: int = 0
    """Checked, or at least received."""
    total_bytes: int = 0
    by_place: Mapping[str, int] = field(default_factory=dict)
    """Bytes by where they came from: folder, cache, or a source's name."""


class _Sink(Protocol):
    """What a tensor is received into: a cache entry or memory."""

    received_bytes: int

    def write(self, data: bytes | memoryview) -> None: ...

    def restart(self) -> None: ...

    def publish(self) -> object: ...


@dataclass(frozen=True, slots=True)
class _Located:
    """Checked bytes on this device; ``path`` None: there was no room on the disk."""

    path: Path | None
    start: int = 0


class SharedWeights(SafetensorsSource):
    """Tensors of the model of a manifest.

    Args:
        manifest: what the model consists of.
        folders: model folders on this device that may hold the same tensors.
        cache: the agent's cache.
        sources: who else may have them, the preferred first.
        on_progress: told about every piece, from several threads.
        first_share: where in the list of tensors to begin; replicas that begin at different places can get the rest
            from each other.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        folders: Sequence[Path] = (),
        cache: BlobCache,
        sources: Sequence[ByteSource],
        on_progress: Callable[[Progress], None] = lambda _: None,
        first_share: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(manifest.tensors)
        self.manifest = manifest
        self._folders = [(folder, index) for folder in folders if (index := _readable_index(folder)) is not None]
        self._cache = cache
        self._sources = {source.name: source for source in sources}
        self._on_progress = on_progress
        self._first_share = first_share
        self._clock = clock
        self._by_place: dict[str, int] = {}
        self._total_bytes = 0
        self._delivered: dict[str, Delivered] = {}
        self._lost: set[str] = set()
        self._lock = threading.Lock()
        self._stopped: str | None = None
        self._stop = threading.Event()
        self._pin = cache.pin()
        self._executor = ThreadPoolExecutor(NUM_STREAMS, thread_name_prefix="weights")
        self._located: dict[str, Future[_Located]] = {}
        self._in_memory: tuple[str, bytearray] | None = None
        self._starts = _starts_by_file(manifest.tensors)

    @property
    def progress(self) -> Progress:
        """How far it is."""
        with self._lock:
            by_place = {place: num_bytes for place, num_bytes in self._by_place.items() if num_bytes}
            return Progress(sum(by_place.values()), self._total_bytes, by_place)

    def config(self) -> dict[str, Any]:
        """Content of the model's config.json."""
        return self.manifest.config

    def prepare(self, names: Iterable[str]) -> None:
        """Begin to obtain the tensors that will be read, and keep them from eviction."""
        wanted = [self._wanted(name) for name in dict.fromkeys(names) if name not in self._located]
        self._pin.add(tensor.sha256 for tensor in wanted)
        with self._lock:
            self._total_bytes += sum(tensor.num_bytes for tensor in wanted)
        first = int(len(wanted) * self._first_share)
        for tensor in wanted[first:] + wanted[:first]:
            self._located[tensor.name] = self._executor.submit(self._locate, tensor)

    def stop(self, reason: str) -> None:
        """Let whatever is being obtained or waited for end soon, with an error; from any thread."""
        self._stopped = reason
        self._stop.set()

    def close(self) -> None:
        """End all transfers and let the cache evict."""
        self.stop("the weights were closed")
        self._executor.shutdown(wait=True, cancel_futures=True)
        for source in self._sources.values():
            source.close()
        self._pin.close()

    # ---- reading ----

    def _fill(self, target: memoryview, file: str, start: int) -> None:
        starts, names = self._starts[file]
        name = names[bisect_right(starts, start) - 1]
        wanted = self._wanted(name)
        if name not in self._located:
            self.prepare([name])
        offset = start - wanted.entry.start
        located = self._located[name].result()
        if located.path is None:
            self._read_from_memory(target, wanted, offset)
            return
        try:
            with located.path.open("rb", buffering=0) as opened:
                opened.seek(located.start + offset)
                done = 0
                while done < len(target):  # one call moves at most 2 GiB on Linux
                    count = opened.readinto(target[done:])
                    if not count:
                        raise ModelError(f"{located.path} became shorter while it was read; load the stage again")
                    done += count
        except OSError as error:
            raise ModelError(f"cannot read {located.path}: {error.strerror}") from error

    def _read_from_memory(self, target: memoryview, wanted: WantedTensor, offset: int) -> None:
        if self._in_memory is None or self._in_memory[0] != wanted.name:
            self._in_memory = None  # before the next one is allocated
            sink = _MemorySink(wanted)
            self._receive(wanted, sink)
            self._in_memory = (wanted.name, sink.data)
        data = self._in_memory[1]
        target[:] = memoryview(data)[offset : offset + len(target)]
        if offset + len(target) == len(data):
            self._in_memory = None

    # ---- obtaining, on several threads ----

    def _locate(self, wanted: WantedTensor) -> _Located:
        for folder, index in self._folders:
            if (found := self._in_folder(folder, index, wanted)) is not None:
                return found
        if (blob := self._cache.check(wanted.sha256)) is not None:
            self._count(CACHE, wanted.num_bytes)
            return _Located(blob)
        if wanted.num_bytes == 0:
            return _Located(None)
        try:
            incoming = self._cache.receive(wanted.sha256, wanted.num_bytes)
        except OverBudgetError as error:
            logger.warning("%s is not kept on the disk: %s", wanted.name, error)
            return _Located(None)
        with incoming:
            if incoming.path is None:
                self._count(CACHE, incoming.received_bytes)
                self._receive(wanted, incoming)
            else:
                self._count(CACHE, wanted.num_bytes)
            assert incoming.path is not None
            return _Located(incoming.path)

    def _in_folder(self, folder: Path, index: Mapping[str, TensorEntry], wanted: WantedTensor) -> _Located | None:
        entry = index.get(wanted.name)
        if entry is None or (entry.dtype, entry.shape) != (wanted.entry.dtype, wanted.entry.shape):
            return None
        path = folder / entry.file
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                found = hash_range(descriptor, entry.start, entry.end)
            finally:
                os.close(descriptor)
        except OSError as error:
            logger.warning("cannot read %s: %s; trying elsewhere", path, error.strerror)
            return None
        if found != wanted.sha256:
            logger.warning("%s of %s differs from the coordinator's; taken from elsewhere", wanted.name, path)
            return None
        self._count(FOLDER, wanted.num_bytes)
        return _Located(path, entry.start)

    def _receive(self, wanted: WantedTensor, sink: _Sink) -> None:
        """Fill a sink from the sources, the nearest first; what one has given the next one goes on with.

        Raises:
            ModelError: no source gave the tensor, or wrong bytes came twice.
        """
        problems: list[str] = []
        corrupt_from: list[str] = []
        asked: set[str] = set()
        while (source := self._next_source(wanted, asked)) is not None:
            asked.add(source.name)
            try:
                self._receive_from(source, wanted, sink)
                return
            except SourceError as error:
                logger.warning("%s: %s", wanted.name, error)
                problems.append(str(error))
                if error.is_lost:
                    self._lost.add(source.name)
            except FrameError as error:
                corrupt_from.append(source.name)
                problems.append(f"{source.name}: {error}")
                logger.warning("%s from %s: %s", wanted.name, source.name, error)
                self._uncount(source.name, wanted.num_bytes)
                sink.restart()
                if len(corrupt_from) == 2:
                    break
                if self._next_source(wanted, asked) is None:
                    asked.discard(source.name)  # once more, from the only one
        if len(corrupt_from) == 2:
            raise ModelError(
                f"{wanted.name} came twice with bytes that are not the coordinator's (from {', '.join(corrupt_from)}); "
                "a disk, a memory or a link is failing: check the model's files on the coordinator and submit again"
            )
        raise ModelError(f"no source gave {wanted.name}: {'; '.join(problems) or 'there is none'}")

    def _receive_from(self, source: ByteSource, wanted: WantedTensor, sink: _Sink) -> None:
        attempts = 0
        while True:
            before = sink.received_bytes
            started_s = self._clock()
            try:
                for piece in source.stream(wanted, before):
                    sink.write(piece)
                    self._count(source.name, len(piece))
                    self._raise_if_stopped()
                self._measure(source.name, sink.received_bytes - before, self._clock() - started_s)
                if sink.received_bytes < wanted.num_bytes:
                    raise SourceError(f"{source.name} ended after {sink.received_bytes} of {wanted.num_bytes} bytes")
                sink.publish()
                return
            except SourceError as error:
                attempts = 1 if sink.received_bytes > before else attempts + 1
                if error.is_lost or attempts >= _ATTEMPTS_WITHOUT_PROGRESS:
                    raise
                self._stop.wait(_FIRST_BACKOFF_S * 2 ** (attempts - 1))
                self._raise_if_stopped()

    def _next_source(self, wanted: WantedTensor, asked: set[str]) -> ByteSource | None:
        able = [
            name
            for name, source in self._sources.items()
            if name not in asked and name not in self._lost and source.holds(wanted)
        ]
        with self._lock:
            order = order_sources(able, self._delivered)
        return self._sources[order[0]] if order else None

    # ---- accounts ----

    def _count(self, place: str, num_bytes: int) -> None:
        with self._lock:
            self._by_place[place] = self._by_place.get(place, 0) + num_bytes
        self._on_progress(self.progress)

    def _uncount(self, place: str, num_bytes: int) -> None:
        with self._lock:
            self._by_place[place] = max(0, self._by_place.get(place, 0) - num_bytes)

    def _measure(self, name: str, num_bytes: int, seconds: float) -> None:
        with self._lock:
            self._delivered[name] = self._delivered.get(name, Delivered()).plus(num_bytes, seconds)

    def _raise_if_stopped(self) -> None:
        if self._stopped is not None:
            raise ModelError(f"loading was stopped: {self._stopped}")

    def _wanted(self, name: str) -> WantedTensor:
        return WantedTensor(name, self._entry(name), self.manifest.sha256[name])


class _MemorySink:
    """A tensor in memory, for a device whose cache has no room."""

    def __init__(self, wanted: WantedTensor) -> None:
        self._wanted = wanted
        self.data = bytearray(wanted.num_bytes)
        self.received_bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        end = self.received_bytes + len(data)
        if end > len(self.data):
            raise FrameError(f"more than its {len(self.data)} bytes came")
        self.data[self.received_bytes : end] = data
        self.received_bytes = end

    def restart(self) -> None:
        self.received_bytes = 0

    def publish(self) -> None:
        found = hashlib.sha256(self.data).hexdigest()
        if found != self._wanted.sha256:
            raise FrameError(f"it came with sha256 {found[:12]}, expected {self._wanted.sha256[:12]}")


def _readable_index(folder: Path) -> dict[str, TensorEntry] | None:
    try:
        return read_safetensors_headers(folder)
    except ModelError as error:
        logger.info("%s is not used: %s", folder, error)
        return None


def _starts_by_file(tensors: Mapping[str, TensorEntry]) -> dict[str, tuple[list[int], list[str]]]:
    """For every file the starts of its tensors, rising, and their names; empty tensors are never looked up."""
    rows: dict[str, list[tuple[int, str]]] = {}
    for name, entry in tensors.items():
        if entry.end > entry.start:
            rows.setdefault(entry.file, []).append((entry.start, name))
    return {
        file: ([start for start, _ in sorted(found)], [name for _, name in sorted(found)])
        for file, found in rows.items()
    }
