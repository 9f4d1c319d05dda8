"""Writes a model's weights tensor by tensor: shards of bounded size with their index, one tensor in memory.

Entry point :func:`write_model`. What becomes of each tensor's bytes is the caller's; names, dtypes and shapes are known
before, because the safetensors format begins with them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from plutino.errors import ExportError
from plutino.safetensors_index import INDEX_FILE, SINGLE_FILE

_ALIGNMENT = 8
"""The format wants the tensors' first byte aligned so; headers are padded with spaces."""


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """One tensor that will be written."""

    name: str
    dtype: str
    """The format's name: F32, BF16, ..."""
    shape: tuple[int, ...]
    num_bytes: int


def write_model(
    folder: Path,
    tensors: Iterable[TensorPlan],
    read: Callable[[str], Iterator[bytes | memoryview]],
    *,
    max_shard_bytes: int,
) -> tuple[str, ...]:
    """Write ``model.safetensors``, or shards with their index if they do not fit one file; gives the files' names.

    Args:
        folder: exists and holds no weights.
        tensors: in the order in which they are written.
        read: a tensor's bytes, in any number of pieces.
        max_shard_bytes: bound on the tensors of one file; a larger tensor has a file of its own.

    Raises:
        ExportError: a tensor has another number of bytes than was said, or the disk refuses.
    """
    writer = ModelWriter(folder, max_shard_bytes=max_shard_bytes)
    writer.add(tensors, read)
    return writer.finish()


class ModelWriter:
    """Writes a model whose tensors become known part by part.

    Args:
        folder: exists and holds no weights.
        max_shard_bytes: bound on the tensors of one file; a larger tensor has a file of its own.
    """

    def __init__(self, folder: Path, *, max_shard_bytes: int) -> None:
        self._folder = folder
        self._max_shard_bytes = max_shard_bytes
        self._shards: list[list[TensorPlan]] = []

    def add(self, tensors: Iterable[TensorPlan], read: Callable[[str], Iterator[bytes | memoryview]]) -> None:
        """Write a part, in shards of its own.

        Raises:
            ExportError: a tensor has another number of bytes than was said, or the disk refuses.
        """
        try:
            for shard in _cut(tensors, self._max_shard_bytes):
                _write_shard(self._folder / _unnamed(len(self._shards)), shard, read)
                self._shards.append(shard)
        except OSError as error:
            raise ExportError(_no_room(self._folder, error)) from error

    def finish(self) -> tuple[str, ...]:
        """Name the shards, now that their number is known, and index them; gives the files' names.

        Raises:
            ExportError: the disk refuses.
        """
        shards = self._shards
        names = [_file_name(number, len(shards)) for number in range(len(shards))]
        try:
            for number, name in enumerate(names):
                (self._folder / _unnamed(number)).rename(self._folder / name)
            if len(shards) > 1:
                places = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
                total_bytes = sum(tensor.num_bytes for shard in shards for tensor in shard)
                index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(places.items()))}
                (self._folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise ExportError(_no_room(self._folder, error)) from error
        return tuple(names)


def _unnamed(number: int) -> str:
    return f"part-{number}.safetensors"


def _no_room(folder: Path, error: OSError) -> str:
    return f"the model cannot be written to {folder}: {error.strerror}; make room there"


def _cut(tensors: Iterable[TensorPlan], max_shard_bytes: int) -> Iterator[list[TensorPlan]]:
    shard: list[TensorPlan] = []
    shard_bytes = 0
    for tensor in tensors:
        if shard and shard_bytes + tensor.num_bytes > max_shard_bytes:
            yield shard
            shard, shard_bytes = [], 0
        shard.append(tensor)
        shard_bytes += tensor.num_bytes
    yield shard


def _file_name(number: int, num_shards: int) -> str:
    return SINGLE_FILE if num_shards == 1 else f"model-{number + 1:05d}-of-{num_shards:05d}.safetensors"


def _write_shard(path: Path, shard: list[TensorPlan], read: Callable[[str], Iterator[bytes | memoryview]]) -> None:
    with path.open("wb") as file:
        file.write(_header(shard))
        for tensor in shard:
            written = 0
            for piece in read(tensor.name):
                written += file.write(piece)
            if written != tensor.num_bytes:
                raise ExportError(f"{tensor.name} came with {written} bytes, expected {tensor.num_bytes}")
        file.flush()
        os.fsync(file.fileno())


def _header(shard: list[TensorPlan]) -> bytes:
    values: dict[str, Mapping[str, object]] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in shard:
        values[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.num_bytes],
        }
        at += tensor.num_bytes
    text = json.dumps(values, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
