"""What a process keeps of its job's plan before."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace

import torch
from safetensors.torch import load, save

from edge_node.going_on import keep_state, left_after_release
from edge_node.loading import read_shadows
from edge_node.shadowing import safetensors_pieces

SNAPSHOT = {"param/a": torch.arange(3.0), "exp_avg/a": torch.ones(3)}
OTHERS = {"param/b": torch.tensor([5.0])}


class Bulk:
    """Hands out one shadow and counts what is asked for."""

    def __init__(self):
        self.asked = []

    def get_shadow(self, job_id, shadow_id, sha256):
        self.asked.append(shadow_id)
        return bytearray(save(OTHERS))


def test_state_is_kept_under_the_hash_that_its_shadow_has():
    kept = keep_state("j1", SNAPSHOT)
    file = b"".join(safetensors_pieces(SNAPSHOT))

    assert list(kept.by_sha256) == [hashlib.sha256(file).hexdigest()]
    assert kept.num_bytes == 24
    assert torch.equal(load(file)["param/a"], SNAPSHOT["param/a"])


def test_stage_without_anything_to_train_keeps_nothing():
    assert not keep_state("j1", {}).by_sha256


def test_restored_state_asks_storage_for_what_others_trained_alone():
    kept, bulk = keep_state("j1", SNAPSHOT), Bulk()
    own = next(iter(kept.by_sha256))

    state = read_shadows(SimpleNamespace(job_id="j1"), bulk, {"own": own, "theirs": "0" * 64}, kept.by_sha256)

    assert bulk.asked == ["theirs"]
    assert {name: tensor.tolist() for name, tensor in state.items()} == {
        "param/a": [0.0, 1.0, 2.0],
        "exp_avg/a": [1.0, 1.0, 1.0],
        "param/b": [5.0],
    }


def test_state_of_another_step_is_not_taken_for_the_one_that_is_asked_for():
    kept, bulk = keep_state("j1", SNAPSHOT), Bulk()

    read_shadows(SimpleNamespace(job_id="j1"), bulk, {"own": "1" * 64}, kept.by_sha256)

    assert bulk.asked == ["own"]


def test_what_is_left_of_a_stage_is_what_the_process_holds_beyond_a_new_one_and_its_state():
    held_bytes = [900]
    device = SimpleNamespace(is_cuda=False, release=lambda: held_bytes.append(160), held_bytes=lambda: held_bytes[-1])

    assert left_after_release(device, baseline_bytes=100, kept_bytes=24) == 36
