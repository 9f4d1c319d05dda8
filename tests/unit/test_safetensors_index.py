from __future__ import annotations

import json
from pathlib import Path

import pytest

from plutino.errors import ModelError
from plutino.safetensors_index import MAX_HEADER_BYTES, read_safetensors_headers


def encoded(tensors, data: bytes | None = None, **changes) -> bytes:
    """A safetensors file of F32 tensors filled with zeros; ``changes`` overwrite single header entries."""
    header, at = {}, 0
    for name, shape in tensors.items():
        size = 4
        for dim in shape:
            size *= dim
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header | changes).encode()
    return len(text).to_bytes(8, "little") + text + (bytes(at) if data is None else data)


def folder(path: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (path / name).write_bytes(content)
    return path


def test_headers_single_file_gives_absolute_ranges(tmp_path):
    content = encoded({"b": (2, 3), "a": (4,)}, __metadata__={"format": "pt"})
    entries = read_safetensors_headers(folder(tmp_path, {"model.safetensors": content}))

    assert list(entries) == ["a", "b"]
    assert (entries["a"].shape, entries["a"].dtype, entries["a"].file) == ((4,), "F32", "model.safetensors")
    assert (entries["b"].end - entries["b"].start, entries["a"].start) == (24, entries["b"].end)
    assert entries["a"].end == len(content)


def test_headers_shards_are_joined_by_the_index(tmp_path):
    index = json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}).encode()
    files = {"one.safetensors": encoded({"a": (1,)}), "two.safetensors": encoded({"b": (2,), "unlisted": (1,)})}

    entries = read_safetensors_headers(folder(tmp_path, files | {"model.safetensors.index.json": index}))

    assert {name: entry.file for name, entry in entries.items()} == {"a": "one.safetensors", "b": "two.safetensors"}


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "gone.safetensors"}, "lacks 1 of 1 shards, first gone"),
        ({"a": "one.safetensors", "c": "one.safetensors"}, "lacks 1 tensors.*first c"),
        ({"a": "../one.safetensors"}, "outside the model folder"),
        (["a"], "no readable weight_map"),
    ],
)
def test_headers_broken_index_is_refused(tmp_path, weight_map, message):
    index = json.dumps({"weight_map": weight_map}).encode()
    files = {"one.safetensors": encoded({"a": (1,)}), "model.safetensors.index.json": index}

    with pytest.raises(ModelError, match=message):
        read_safetensors_headers(folder(tmp_path, files))


BROKEN = {
    "cut off": (encoded({"a": (4,)})[:-3], "cut off or grown"),
    "grown": (encoded({"a": (4,)}) + b"x", "cut off or grown"),
    "header longer than the file": ((1 << 40).to_bytes(8, "little") + b"{}", "announces a header of 1099511627776"),
    "header over the bound": ((MAX_HEADER_BYTES + 1).to_bytes(8, "little"), "announces a header"),
    "empty": (b"", "announces a header"),
    "not JSON": ((4).to_bytes(8, "little") + b"abcd", "is not JSON"),
    "not a mapping": ((2).to_bytes(8, "little") + b"[]", "is not a mapping"),
    "wrong size": (
        encoded({"a": (4,)}, a={"dtype": "F32", "shape": [5], "data_offsets": [0, 16]}),
        "20 bytes.*holds 16",
    ),
    "unknown dtype": (encoded({"a": (1,)}, a={"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}), "entry of a"),
    "negative": (encoded({"a": (1,)}, a={"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}), "entry of a"),
    "overlap": (
        encoded({"a": (1,), "b": (1,)}, b={"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}),
        "b starts at byte",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_headers_broken_file_is_refused(tmp_path, case):
    content, message = BROKEN[case]

    with pytest.raises(ModelError, match=message):
        read_safetensors_headers(folder(tmp_path, {"model.safetensors": content}))


def test_headers_pickled_weights_are_refused_with_the_way_out(tmp_path):
    with pytest.raises(ModelError, match=r"pytorch_model.bin.*save_pretrained"):
        read_safetensors_headers(folder(tmp_path, {"pytorch_model.bin": b"x"}))


@pytest.mark.parametrize("path", [".", "nowhere"])
def test_headers_folder_without_weights_is_refused(tmp_path, path):
    with pytest.raises(ModelError, match=r"model\.path"):
        read_safetensors_headers(tmp_path / path)
