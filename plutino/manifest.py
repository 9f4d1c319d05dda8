"""The manifest of a base model: its configuration, where every tensor lies, and the sha256 of every tensor's bytes.

The coordinator makes it once (:func:`make_manifest`); every worker gets it, checked against the hash in its assignment,
and checks against it whatever bytes it is given, by whom ever.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from plutino.digests import tensor_digests
from plutino.errors import ModelError
from plutino.random_weights import drawn_digests, read_random_weights
from plutino.safetensors_index import DTYPE_BYTES, TensorEntry, read_safetensors_headers

_VERSION = 2
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)


@dataclass(frozen=True, slots=True)
class HubOrigin:
    """Where on the hub the files lie."""

    repository: str
    """``organisation/name``."""
    commit: str
    """Of 40 hexadecimal digits; branches and tags move."""


@dataclass(frozen=True)
class Manifest:
    """What a base model consists of."""

    config_json: str
    """Text of config.json."""
    tensors: Mapping[str, TensorEntry]
    """By the names in the files, sorted."""
    sha256: Mapping[str, str]
    """Of each tensor's bytes as they are stored."""
    origin: HubOrigin | None = None
    packed: Mapping[str, TensorEntry] = field(default_factory=dict)
    """Packed tensors of its matrices that the coordinator made, by :func:`packed_name`: of what the model computes they
    say nothing new."""

    @property
    def config(self) -> dict[str, Any]:
        """Content of config.json.

        Raises:
            ModelError: it is no JSON mapping.
        """
        return parse_model_config(self.config_json, "config.json")

    @functools.cached_property
    def base_hash(self) -> str:
        """Hash of what the model computes: config.json and all tensors, however they are spread over files."""
        total = hashlib.sha256()
        config = self.config_json.encode()
        total.update(b"config.json %d\n" % len(config) + config)
        for name, entry in self.tensors.items():
            total.update(f"{name} {entry.dtype} {list(entry.shape)} {self.sha256[name]}\n".encode())
        return total.hexdigest()

    def to_bytes(self) -> bytes:
        """As :meth:`from_bytes` reads it; the same manifest gives the same bytes."""
        values = {
            "version": _VERSION,
            "config": self.config_json,
            "origin": None if self.origin is None else [self.origin.repository, self.origin.commit],
            "tensors": self._rows(self.tensors),
            "packed": self._rows(self.packed),
        }
        return json.dumps(values, sort_keys=True, separators=(",", ":")).encode()

    def _rows(self, tensors: Mapping[str, TensorEntry]) -> dict[str, list[Any]]:
        return {
            name: [entry.file, entry.dtype, list(entry.shape), entry.start, entry.end, self.sha256[name]]
            for name, entry in tensors.items()
        }

    @classmethod
    def from_bytes(cls, data: bytes | bytearray) -> Manifest:
        """Read and check a manifest.

        Raises:
            ModelError: it is malformed or of another version.
        """
        try:
            values = json.loads(data)
            if values["version"] != _VERSION:
                raise ValueError(f"version {values['version']}, this plutino reads {_VERSION}")
            rows, packed_rows = (dict(sorted(values[key].items())) for key in ("tensors", "packed"))
            tensors, packed = ({name: _entry(name, row) for name, row in of.items()} for of in (rows, packed_rows))
            if rows.keys() & packed_rows.keys():
                raise ValueError("a packed tensor has the name of a stored one")
            origin = None if values["origin"] is None else HubOrigin(*map(str, values["origin"]))
            sha256 = {name: str(row[5]) for name, row in (rows | packed_rows).items()}
            return cls(str(values["config"]), tensors, sha256, origin, packed)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise ModelError(
                f"the model's manifest cannot be read ({error!r}); use the same version of plutino on all machines"
            ) from error


def packed_name(matrix: str, scheme: str, part: str) -> str:
    """What a packed tensor of a matrix is called beside the stored tensors."""
    return f"{matrix}.{scheme}.{part}"


def with_packed(manifest: Manifest, packed_dir: Path) -> Manifest:
    """The manifest with the packed tensors of a folder of safetensors files.

    Raises:
        ModelError: they cannot be read.
    """
    packed = read_safetensors_headers(packed_dir)
    return replace(manifest, packed=packed, sha256={**manifest.sha256, **_digests(packed_dir, packed)})


def make_manifest(model_dir: str | Path, *, origin: HubOrigin | None = None) -> Manifest:
    """The manifest of a model folder; the first time all its weights are read, which takes seconds per GB.

    Raises:
        ModelError: config.json or the safetensors files cannot be read.
    """
    folder = Path(model_dir)
    try:
        config_json = (folder / "config.json").read_bytes().decode()
    except OSError as error:
        raise ModelError(f"cannot read {folder / 'config.json'}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ModelError(f"{folder / 'config.json'} is not UTF-8 text; download it again") from error
    drawn = read_random_weights(folder)
    if drawn is not None:
        return Manifest(config_json, drawn, drawn_digests(drawn), origin)
    tensors = read_safetensors_headers(folder)
    return Manifest(config_json, tensors, _digests(folder, tensors), origin)


def _digests(folder: Path, tensors: Mapping[str, TensorEntry]) -> dict[str, str]:
    digests: dict[str, str] = {}
    for file in sorted({entry.file for entry in tensors.values()}):
        own = {name: entry for name, entry in tensors.items() if entry.file == file}
        digests |= tensor_digests(folder / file, own)
    return digests


def base_model_hash(model_dir: str | Path) -> str:
    """Hash of what a base model computes: its config.json and the contents of its tensors.

    Two folders with the same hash give the same model; the tokenizer and the division into shards do not enter.

    Raises:
        ModelError: config.json or the safetensors files cannot be read.
    """
    return make_manifest(model_dir).base_hash


def parse_model_config(text: str | bytes, where: str) -> dict[str, Any]:
    """Content of a config.json.

    Raises:
        ModelError: it is no JSON mapping.
    """
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ModelError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ModelError(f"{where} must hold a mapping, not {type(values).__name__}")
    return values


def _entry(name: str, row: list[Any]) -> TensorEntry:
    file, dtype, shape, start, end, digest = row
    numbers = (*shape, start, end)
    if not all(type(number) is int and number >= 0 for number in numbers) or end < start:
        raise ValueError(f"{name} has sizes {numbers}")
    if Path(file).name != file or dtype not in DTYPE_BYTES or not _SHA256.fullmatch(digest):
        raise ValueError(f"{name} has file {file!r}, dtype {dtype!r} or a malformed sha256")
    return TensorEntry(file, dtype, tuple(shape), start, end)
