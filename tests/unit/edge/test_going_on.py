"""What a process keeps of its job's plan before."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load, save

from edge_node.cache import BlobCache
from edge_node.cache_server import CacheServer
from edge_node.going_on import keep_state, left_after_release
from edge_node.network import DeviceNetwork
from edge_node.shadowing import safetensors_pieces, tensors_in
from edge_node.state_exchange import StateHandover
from plutino.job.assignment import DeviceCache, RestorePoint

SNAPSHOT = {"param/a": torch.arange(3.0), "exp_avg/a": torch.ones(3)}
OTHERS = {"param/b": torch.tensor([5.0])}
FILE = b"".join(safetensors_pieces(SNAPSHOT))
SHA256 = hashlib.sha256(FILE).hexdigest()


class Bulk:
    """Hands out one shadow and counts what is asked for."""

    def __init__(self):
        self.asked = []

    def get_shadow(self, job_id, shadow_id, sha256):
        self.asked.append(shadow_id)
        return bytearray(save(OTHERS))


def assignment_of(*caches):
    stages = (SimpleNamespace(num_replicas=1), SimpleNamespace(num_replicas=1))
    return SimpleNamespace(job_id="j1", caches=caches, stages=stages, replica_index=0)


def point_of(**shadows):
    return RestorePoint(step=3, shadows=shadows, sizes_bytes=dict.fromkeys(shadows, len(FILE)), is_left_on_devices=True)


@pytest.fixture
def another_device(tmp_path):
    """Another device of the job whose worker left SNAPSHOT in its cache, which it serves."""
    cache = BlobCache(tmp_path / "another", 1 << 20)
    server = CacheServer(cache, DeviceNetwork(), lambda job_id: job_id == "j1")
    try:
        StateHandover(assignment_of(), Bulk(), None, cache, None).leave(SNAPSHOT)
        yield cache, DeviceCache(agent_id="a2", device_name="another", address=server.address)
    finally:
        server.close()


def test_state_is_kept_under_the_hash_that_its_shadow_has():
    kept = keep_state("j1", SNAPSHOT)

    assert list(kept.by_sha256) == [SHA256]
    assert kept.num_bytes == 24
    assert torch.equal(load(FILE)["param/a"], SNAPSHOT["param/a"])


def test_files_of_states_are_read_where_they_lie():
    snapshot = {**SNAPSHOT, "adam_step/a": torch.tensor(7.0), "param/none": torch.zeros(2, 0)}
    file = bytearray(b"".join(safetensors_pieces(snapshot)))

    found = tensors_in(file)
    file[-4:] = torch.tensor(8.0).numpy().tobytes()

    assert found.keys() == snapshot.keys()
    assert all(torch.equal(found[name], snapshot[name]) for name in ("param/a", "exp_avg/a", "param/none"))
    assert float(found["adam_step/a"]) == 8.0 and found["adam_step/a"].shape == ()


def test_stage_without_anything_to_train_keeps_nothing():
    assert not keep_state("j1", {}).by_sha256


def test_restored_state_asks_the_coordinator_for_what_others_trained_alone(tmp_path):
    bulk = Bulk()
    handover = StateHandover(assignment_of(), bulk, None, BlobCache(tmp_path), keep_state("j1", SNAPSHOT))

    state = handover.read(point_of(theirs="0" * 64, own=SHA256), ["a", "b"])

    assert bulk.asked == ["theirs"]
    assert handover.bytes_by_place == {"kept": 24, "coordinator": len(save(OTHERS))}
    assert {name: tensor.tolist() for name, tensor in state.items()} == {
        "param/a": [0.0, 1.0, 2.0],
        "exp_avg/a": [1.0, 1.0, 1.0],
        "param/b": [5.0],
    }


def test_stage_that_trained_all_that_it_needs_asks_nobody(tmp_path):
    bulk = Bulk()
    handover = StateHandover(assignment_of(), bulk, None, BlobCache(tmp_path), keep_state("j1", SNAPSHOT))

    handover.read(point_of(theirs="0" * 64, own=SHA256), ["a"])

    assert bulk.asked == []


def test_state_of_another_step_is_not_taken_for_the_one_that_is_asked_for(tmp_path):
    bulk = Bulk()

    StateHandover(assignment_of(), bulk, None, BlobCache(tmp_path), keep_state("j1", SNAPSHOT)).read(
        point_of(own="1" * 64), ["b"]
    )

    assert bulk.asked == ["own"]


def test_state_that_another_device_left_comes_from_there(another_device, tmp_path):
    _, address = another_device
    bulk = Bulk()
    handover = StateHandover(assignment_of(address), bulk, None, BlobCache(tmp_path / "own"), None)

    state = handover.read(point_of(theirs=SHA256), ["a"])

    assert (bulk.asked, handover.bytes_by_place) == ([], {"device another": len(FILE)})
    assert torch.equal(state["param/a"], SNAPSHOT["param/a"])


def test_state_that_another_device_has_damaged_comes_from_the_coordinator(another_device, tmp_path):
    cache, address = another_device
    path = cache.find(SHA256)
    path.write_bytes(FILE[:-1] + bytes([FILE[-1] ^ 1]))
    bulk = Bulk()

    StateHandover(assignment_of(address), bulk, None, BlobCache(tmp_path / "own"), None).read(
        point_of(theirs=SHA256), ["a"]
    )

    assert bulk.asked == ["theirs"]


def test_state_that_was_left_is_gone_when_the_next_plans_worker_ends(tmp_path):
    cache = BlobCache(tmp_path, 1 << 20)
    kept = StateHandover(assignment_of(), Bulk(), None, cache, None).leave(SNAPSHOT)
    assert cache.find(SHA256) is not None

    StateHandover(assignment_of(), Bulk(), None, cache, kept).close()

    assert cache.find(SHA256) is None


def test_what_is_left_of_a_stage_is_what_the_process_holds_beyond_a_new_one_and_its_state():
    held_bytes = [900]
    device = SimpleNamespace(is_cuda=False, release=lambda: held_bytes.append(160), held_bytes=lambda: held_bytes[-1])

    assert left_after_release(device, baseline_bytes=100, kept_bytes=24) == 36
