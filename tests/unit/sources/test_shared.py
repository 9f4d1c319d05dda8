from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from edge_node import cache_entries
from edge_node.cache import BlobCache
from edge_node.sources.base import SourceError, WantedTensor
from edge_node.sources.shared import Progress, SharedWeights
from plutino.errors import AgentError, ModelError
from plutino.manifest import Manifest, make_manifest

TENSORS = {name: np.arange(1000, dtype=np.float32) + number for number, name in enumerate("abcd")}
NUM_BYTES = 4000
PIECE = 1500
WAIT_S = 20.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    (path / "config.json").write_text('{"model_type": "llama"}')
    save_file(TENSORS, path / "model.safetensors")
    return path


@pytest.fixture(scope="module")
def manifest(folder: Path) -> Manifest:
    return make_manifest(folder)


class FakeSource:
    """Gives tensors' bytes in pieces; ``faults`` maps a tensor to what happens at its 1st, 2nd, ... request."""

    def __init__(self, name: str, held: str = "abcd", faults: dict[str, list[str]] | None = None) -> None:
        self.name = name
        self.held = held
        self.faults = faults or {}
        self.asked: list[tuple[str, int]] = []
        self.is_closed = False

    def holds(self, wanted: WantedTensor) -> bool:
        return wanted.name in self.held

    def stream(self, wanted: WantedTensor, offset: int) -> Iterator[bytes]:
        self.asked.append((wanted.name, offset))
        faults = self.faults.get(wanted.name, [])
        fault = faults.pop(0) if faults else ""
        data = TENSORS[wanted.name].tobytes()
        if fault == "flip":
            data = data[:-1] + bytes([data[-1] ^ 1])
        if fault in ("dead", "lost"):
            raise SourceError(f"{self.name} is away", is_lost=fault == "lost")
        for start in range(offset, len(data), PIECE):
            yield data[start : start + PIECE]
            if fault == "breaks":
                raise SourceError(f"{self.name} broke off")
            if fault == "ends early":
                return

    def close(self) -> None:
        self.is_closed = True


def load(
    manifest: Manifest, cache: BlobCache, *sources: FakeSource, names: str = "abcd", **options
) -> tuple[dict[str, int], list[Progress]]:
    """Read tensors as a stage does; gives where the bytes came from, and the progress told."""
    told: list[Progress] = []
    weights = SharedWeights(manifest, cache=cache, sources=sources, on_progress=told.append, **options)
    try:
        weights.prepare(names)
        for name in names:
            assert weights.read(name, torch.float32).numpy().tobytes() == TENSORS[name].tobytes()
        return dict(weights.progress.by_place), told
    finally:
        weights.close()
        assert all(source.is_closed for source in sources)


def test_folder_on_the_device_is_read_and_nobody_is_asked(folder, manifest, tmp_path):
    source, cache = FakeSource("coordinator"), BlobCache(tmp_path)

    places, _ = load(manifest, cache, source, folders=[folder])

    assert (places, source.asked, cache.used_bytes()) == ({"folder": 4 * NUM_BYTES}, [], 0)


def test_tensor_of_a_folder_that_differs_comes_from_elsewhere(manifest, tmp_path):
    (tmp_path / "other").mkdir()
    save_file({**TENSORS, "b": TENSORS["b"] + 1}, tmp_path / "other/model.safetensors")
    source = FakeSource("coordinator")

    places, _ = load(manifest, BlobCache(tmp_path / "cache"), source, folders=[tmp_path / "other"])

    assert places == {"folder": 3 * NUM_BYTES, "coordinator": NUM_BYTES}
    assert source.asked == [("b", 0)]


def test_folder_that_is_no_model_is_passed_over(manifest, tmp_path):
    places, _ = load(manifest, BlobCache(tmp_path / "cache"), FakeSource("coordinator"), folders=[tmp_path])

    assert places == {"coordinator": 4 * NUM_BYTES}


def test_second_load_comes_from_the_cache_alone(manifest, tmp_path):
    load(manifest, BlobCache(tmp_path), FakeSource("coordinator"))

    places, _ = load(manifest, BlobCache(tmp_path), FakeSource("coordinator", held=""))

    assert places == {"cache": 4 * NUM_BYTES}


def test_flipped_byte_in_the_cache_is_fetched_again(manifest, tmp_path):
    cache, source = BlobCache(tmp_path), FakeSource("coordinator")
    load(manifest, cache, FakeSource("coordinator"))
    path = cache.find(manifest.sha256["c"])
    path.write_bytes(b"x" + path.read_bytes()[1:])

    places, _ = load(manifest, cache, source)

    assert places == {"cache": 3 * NUM_BYTES, "coordinator": NUM_BYTES}
    assert source.asked == [("c", 0)]


def test_only_the_tensors_asked_for_are_fetched(manifest, tmp_path):
    source = FakeSource("coordinator")

    load(manifest, BlobCache(tmp_path), source, names="bd")

    assert sorted(source.asked) == [("b", 0), ("d", 0)]


def test_sources_are_asked_in_their_order_and_only_for_what_they_hold(manifest, tmp_path):
    hub, device = FakeSource("hub", held="a"), FakeSource("device", held="ab")

    places, _ = load(manifest, BlobCache(tmp_path), hub, device, FakeSource("coordinator"))

    assert places == {"hub": NUM_BYTES, "device": NUM_BYTES, "coordinator": 2 * NUM_BYTES}


@pytest.mark.parametrize("fault", ["breaks", "ends early"])
def test_broken_transfer_goes_on_where_it_stopped(manifest, tmp_path, fault):
    source = FakeSource("coordinator", faults={"a": [fault, fault]})

    places, _ = load(manifest, BlobCache(tmp_path), source, names="a")

    assert source.asked == [("a", 0), ("a", PIECE), ("a", 2 * PIECE)]
    assert places == {"coordinator": NUM_BYTES}


def test_next_source_goes_on_where_a_dead_one_stopped(manifest, tmp_path):
    device, coordinator = FakeSource("device", faults={"a": ["breaks", "dead", "dead"]}), FakeSource("coordinator")

    places, _ = load(manifest, BlobCache(tmp_path), device, coordinator, names="a")

    assert coordinator.asked == [("a", PIECE)]
    assert places == {"device": PIECE, "coordinator": NUM_BYTES - PIECE}


def test_next_process_goes_on_where_the_last_one_stopped(manifest, tmp_path):
    broken = FakeSource("coordinator", faults={"a": ["breaks", "dead", "dead"]})
    with pytest.raises(ModelError, match="no source gave a: coordinator is away"):
        load(manifest, BlobCache(tmp_path), broken, names="a")
    source = FakeSource("coordinator")

    places, _ = load(manifest, BlobCache(tmp_path), source, names="a")

    assert source.asked == [("a", PIECE)]
    assert places == {"cache": PIECE, "coordinator": NUM_BYTES - PIECE}


def test_lost_source_is_not_asked_again(manifest, tmp_path):
    hub = FakeSource("hub", faults={name: ["lost"] for name in "abcd"})
    weights = SharedWeights(manifest, cache=BlobCache(tmp_path), sources=[hub, FakeSource("coordinator")])
    try:
        for name in "abcd":  # one after the other
            weights.read(name, torch.float32)
    finally:
        weights.close()

    assert hub.asked == [("a", 0)]


def test_wrong_bytes_are_fetched_once_more_from_the_next_source(manifest, tmp_path):
    device, coordinator = FakeSource("device", faults={"a": ["flip"]}), FakeSource("coordinator")

    places, _ = load(manifest, BlobCache(tmp_path), device, coordinator, names="a")

    assert (device.asked, coordinator.asked) == ([("a", 0)], [("a", 0)])
    assert places == {"coordinator": NUM_BYTES}


def test_wrong_bytes_are_fetched_once_more_from_the_only_source(manifest, tmp_path):
    source = FakeSource("coordinator", faults={"a": ["flip"]})

    load(manifest, BlobCache(tmp_path), source, names="a")

    assert source.asked == [("a", 0), ("a", 0)]


@pytest.mark.parametrize("budget_bytes", [1 << 20, 0], ids=["cache", "memory"])
def test_wrong_bytes_twice_end_the_load_and_nothing_of_them_is_kept(manifest, tmp_path, budget_bytes):
    source, cache = FakeSource("coordinator", faults={"a": ["flip", "flip"]}), BlobCache(tmp_path, budget_bytes)

    with pytest.raises(
        ModelError, match=r"a came twice with bytes that are not the coordinator's \(from coordinator, "
    ):
        load(manifest, cache, source, names="a")

    assert cache.find(manifest.sha256["a"]) is None
    assert load(manifest, cache, FakeSource("coordinator"), names="a")[0] == {"coordinator": NUM_BYTES}


def test_cache_without_room_leaves_the_tensors_to_memory_and_keeps_what_fits(manifest, tmp_path):
    cache = BlobCache(tmp_path, 2 * NUM_BYTES)

    places, _ = load(manifest, cache, FakeSource("coordinator"))

    assert places == {"coordinator": 4 * NUM_BYTES}
    assert cache.used_bytes() == 2 * NUM_BYTES


def test_full_disk_ends_the_load_with_the_way_out_and_the_next_load_goes_on(manifest, tmp_path, monkeypatch):
    write, left = cache_entries.write_all, [NUM_BYTES + PIECE]

    def write_while_there_is_room(descriptor: int, view: memoryview) -> None:
        left[0] -= 0 if len(view) < 100 else len(view)  # pins are small
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(descriptor, view)

    with monkeypatch.context() as patch:
        patch.setattr(cache_entries, "write_all", write_while_there_is_room)
        patch.setattr("edge_node.sources.shared.NUM_STREAMS", 1)
        with pytest.raises(AgentError, match=r"the disk is full.*--cache-dir"):
            load(manifest, BlobCache(tmp_path), FakeSource("coordinator"))

    places, _ = load(manifest, BlobCache(tmp_path), FakeSource("coordinator"))
    assert places == {"cache": NUM_BYTES, "coordinator": 3 * NUM_BYTES}


def test_two_workers_of_one_device_share_their_downloads(manifest, tmp_path):
    sources = [FakeSource("coordinator"), FakeSource("coordinator")]
    threads = [threading.Thread(target=load, args=(manifest, BlobCache(tmp_path), source)) for source in sources]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)

    assert sorted(sources[0].asked + sources[1].asked) == [(name, 0) for name in "abcd"]


def test_what_a_running_job_uses_is_not_evicted_by_the_next(manifest, tmp_path):
    cache = BlobCache(tmp_path, 2 * NUM_BYTES)
    first = SharedWeights(manifest, cache=cache, sources=[FakeSource("coordinator")])
    try:
        first.prepare("ab")
        for name in "ab":
            first.read(name, torch.float32)
        load(manifest, cache, FakeSource("coordinator"), names="cd")
        assert cache.find(manifest.sha256["a"]) and cache.find(manifest.sha256["b"])
    finally:
        first.close()
    load(manifest, cache, FakeSource("coordinator"), names="cd")
    assert cache.find(manifest.sha256["c"]) and cache.find(manifest.sha256["d"])


def test_progress_rises_to_the_total(manifest, tmp_path):
    _, told = load(manifest, BlobCache(tmp_path), FakeSource("coordinator"))

    assert all(progress.total_bytes == 4 * NUM_BYTES for progress in told)
    assert max(progress.done_bytes for progress in told) == 4 * NUM_BYTES


def test_stopped_load_ends_with_the_reason(manifest, tmp_path):
    source = FakeSource("coordinator", faults={"a": ["breaks", "dead", "dead"]})
    weights = SharedWeights(manifest, cache=BlobCache(tmp_path), sources=[source])
    weights.stop("the job was cancelled")
    try:
        with pytest.raises(ModelError, match="loading was stopped: the job was cancelled"):
            weights.read("a", torch.float32)
    finally:
        weights.close()
