from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from plutino import digests as digests_module
from plutino.errors import ModelError
from plutino.manifest import HubOrigin, Manifest, base_model_hash, make_manifest
from tests.unit.test_safetensors_index import encoded, folder

TENSORS = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.ones(5, np.float16)}


@pytest.fixture(autouse=True)
def _forgetful(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(digests_module, "_known", {})


def model(path: Path, *, shards: int = 1) -> Path:
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "llama"}')
    if shards == 1:
        save_file(TENSORS, path / "model.safetensors")
        return path
    files = {name: f"model-{number}.safetensors" for number, name in enumerate(TENSORS)}
    for name, file in files.items():
        save_file({name: TENSORS[name]}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return path


def make_old(folder: Path) -> None:
    for path in folder.iterdir():
        os.utime(path, (1_000_000_000, 1_000_000_000))


def test_manifest_holds_the_sha256_of_every_tensor_and_survives_the_wire(tmp_path):
    manifest = make_manifest(model(tmp_path / "m"), origin=HubOrigin("org/name", "c" * 40))

    assert manifest.sha256 == {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in TENSORS.items()}
    assert list(manifest.tensors) == ["a", "b"]
    again = Manifest.from_bytes(manifest.to_bytes())
    assert again == manifest
    assert (again.base_hash, again.to_bytes()) == (manifest.base_hash, manifest.to_bytes())


def test_base_hash_does_not_depend_on_the_division_into_shards(tmp_path):
    assert base_model_hash(model(tmp_path / "whole")) == base_model_hash(model(tmp_path / "cut", shards=2))


def test_tensors_are_read_once_per_file_also_by_another_process(tmp_path, monkeypatch):
    source = model(tmp_path / "m")
    make_old(source)
    first = make_manifest(source)
    monkeypatch.setattr(digests_module, "_known", {})  # as in a fresh process
    monkeypatch.setattr(digests_module, "_hash_file", lambda *_: pytest.fail("the file was read again"))

    assert make_manifest(source) == first


def test_file_that_changed_is_read_again(tmp_path):
    source = model(tmp_path / "m")
    make_old(source)
    before = make_manifest(source)
    save_file({**TENSORS, "a": TENSORS["a"] * 2}, source / "model.safetensors")

    assert make_manifest(source).sha256["a"] != before.sha256["a"]


def test_nothing_is_remembered_of_a_file_that_was_just_written(tmp_path):
    make_manifest(model(tmp_path / "m"))

    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("remembered", ["", "[]", '{"path": 1}'], ids=["empty", "list", "other types"])
def test_damaged_memory_is_passed_over(tmp_path, monkeypatch, remembered):
    source = model(tmp_path / "m")
    make_old(source)
    first = make_manifest(source)
    (path,) = (tmp_path / "cache/plutino/digests").iterdir()
    path.write_text(remembered)
    monkeypatch.setattr(digests_module, "_known", {})

    assert make_manifest(source) == first


@pytest.mark.parametrize(
    "change",
    [
        {"version": 1},
        {"tensors": {"a": ["../x.safetensors", "F32", [1], 0, 4, "0" * 64]}},
        {"tensors": {"a": ["x.safetensors", "F32", [1], -4, 0, "0" * 64]}},
        {"tensors": {"a": ["x.safetensors", "F32", [1], 0, 4, "zz"]}},
        {"tensors": {"a": []}},
        {"tensors": None},
    ],
    ids=["version", "path", "negative", "sha256", "short row", "none"],
)
def test_malformed_manifest_is_refused(tmp_path, change):
    values = json.loads(make_manifest(model(tmp_path / "m")).to_bytes()) | change

    with pytest.raises(ModelError, match="the same version"):
        Manifest.from_bytes(json.dumps(values).encode())


def model_files(**changes: bytes) -> dict[str, bytes]:
    return {"config.json": b"{}", "model.safetensors": encoded({"a": (1,)})} | changes


def test_base_model_hash_is_that_of_the_content_and_not_of_the_place(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    first = folder(tmp_path / "one", model_files())
    second = folder(tmp_path / "two", model_files(**{"README.md": b"hello"}))

    assert base_model_hash(first) == base_model_hash(second)


@pytest.mark.parametrize(
    "changes",
    [{"config.json": b"{ }"}, {"model.safetensors": encoded({"a": (1,)}, data=b"abcd")}],
)
def test_base_model_hash_changes_with_config_or_weights(tmp_path, changes):
    before = base_model_hash(folder(tmp_path, model_files()))

    assert base_model_hash(folder(tmp_path, model_files(**changes))) != before


def test_base_model_hash_without_config_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"cannot read .*config\.json"):
        base_model_hash(folder(tmp_path, {"model.safetensors": encoded({"a": (1,)})}))
