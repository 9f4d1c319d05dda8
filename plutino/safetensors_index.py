"""Where the tensors of a model folder lie, read from the headers alone: no torch, no weight byte.

Owns the reading of ``model.safetensors`` and of ``model.safetensors.index.json`` with its shards. Headers come from
files that somebody else wrote, so every number in them is checked against the file before it is used.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plutino.errors import ModelError

DTYPE_BYTES: Mapping[str, int] = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
}
"""Bytes of one element, by the names that the safetensors format uses."""

MAX_HEADER_BYTES = 100_000_000
"""The format's own bound: a longer header is an attack or garbage, and is never read into memory."""

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies."""

    file: str
    """Name of the file inside the model folder."""
    dtype: str
    """The format's name: F32, BF16, ..."""
    shape: tuple[int, ...]
    start: int
    """First byte of the tensor, counted from the start of the file."""
    end: int
    """One past its last byte."""


def read_safetensors_headers(model_dir: str | Path) -> dict[str, TensorEntry]:
    """Find every tensor of a model folder, in name order.

    Raises:
        ModelError: the folder holds no safetensors, a header is broken or does not fit its file, or a shard is missing.
    """
    folder = Path(model_dir)
    entries: dict[str, TensorEntry] = {}
    for file, wanted in _files(folder).items():
        found = _read_header(folder / file)
        missing = sorted(set(wanted) - found.keys()) if wanted is not None else []
        if missing:
            raise ModelError(
                f"{folder / file} lacks {len(missing)} tensors that {INDEX_FILE} places in it, first {missing[0]}; "
                "download the model again"
            )
        entries |= found if wanted is None else {name: found[name] for name in wanted}
    return dict(sorted(entries.items()))


def _files(folder: Path) -> dict[str, list[str] | None]:
    """The safetensors files of a folder, each with the tensors to take from it; None takes all."""
    if not folder.is_dir():
        raise ModelError(f"{folder} is not a folder; model.path must name one with config.json and safetensors")
    if (folder / SINGLE_FILE).is_file():
        return {SINGLE_FILE: None}
    if (folder / INDEX_FILE).is_file():
        return _read_index(folder / INDEX_FILE)
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    if pickled:
        raise ModelError(
            f"{folder} holds only pickled weights ({', '.join(pickled[:3])}), which can run code when read; "
            "load the model once with transformers and call save_pretrained, which writes safetensors"
        )
    raise ModelError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}; model.path must name a model's folder")


def _read_index(path: Path) -> dict[str, list[str] | None]:
    try:
        weight_map = json.loads(_read_bytes(path))["weight_map"]
        pairs = sorted((str(name), str(file)) for name, file in weight_map.items())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} has no readable weight_map: {error}; download the model again") from error
    shards: dict[str, list[str] | None] = {}
    for name, file in pairs:
        if Path(file).name != file:
            raise ModelError(f"{path} places {name} in {file!r}, outside the model folder; do not trust this model")
        tensors = shards.setdefault(file, [])
        assert tensors is not None
        tensors.append(name)
    missing = [file for file in shards if not (path.parent / file).is_file()]
    if missing:
        raise ModelError(
            f"{path.parent} lacks {len(missing)} of {len(shards)} shards, first {missing[0]}; finish the download"
        )
    return shards


def _read_header(path: Path) -> dict[str, TensorEntry]:
    """Entries of one file, unmapped metadata left out."""
    try:
        with path.open("rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            header_bytes = int.from_bytes(file.read(8), "little")
            if file_bytes < 8 or header_bytes > min(MAX_HEADER_BYTES, file_bytes - 8):
                raise ModelError(
                    f"{path} announces a header of {header_bytes} bytes in a file of {file_bytes} bytes; "
                    "it is cut off or no safetensors file: download it again"
                )
            header = json.loads(file.read(header_bytes))
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ModelError(f"the header of {path} is not JSON: {error}; download it again") from error
    if not isinstance(header, dict):
        raise ModelError(f"the header of {path} is not a mapping; download it again")
    header.pop("__metadata__", None)
    data_start = 8 + header_bytes
    entries = {name: _entry(path, name, value, data_start) for name, value in header.items()}
    _check_extents(path, entries, data_start, file_bytes)
    return entries


def _entry(path: Path, name: str, value: Any, data_start: int) -> TensorEntry:
    try:
        dtype, shape, (start, end) = value["dtype"], value["shape"], value["data_offsets"]
        if not all(type(number) is int and number >= 0 for number in (*shape, start, end)):
            raise ValueError("sizes must be whole numbers from 0")
        needed_bytes = math.prod(shape) * DTYPE_BYTES[dtype]
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path}: the header's entry of {name} is broken ({error!r}); download it again") from error
    if end - start != needed_bytes:
        raise ModelError(
            f"{path}: {name} is {dtype} {list(shape)}, {needed_bytes} bytes, but its range holds {end - start}; "
            "download it again"
        )
    return TensorEntry(path.name, dtype, tuple(shape), data_start + start, data_start + end)


def _check_extents(path: Path, entries: Mapping[str, TensorEntry], data_start: int, file_bytes: int) -> None:
    """The tensors must tile the file: an overlap or a hole means that somebody else's bytes would be read."""
    at = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != at:
            raise ModelError(f"{path}: {name} starts at byte {entry.start}, expected {at}; download it again")
        at = entry.end
    if at != file_bytes:
        raise ModelError(
            f"{path} has {file_bytes} bytes but its tensors end at {at}; it is cut off or grown: download it again"
        )


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
