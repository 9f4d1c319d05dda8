"""Joining the stages' parts into the tensors of one checkpoint: pure, and without torch.

A part is a shadow's safetensors file; of its tensors only the parameters are read, not the optimiser's moments. Entry
points: :func:`read_tensors` and :class:`PartJoiner`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plutino.errors import ExportError
from plutino.safetensors_index import MAX_HEADER_BYTES

Float32Array = NDArray[np.float32]

PARAMETER_PREFIX = "param/"
"""Before the global name of a parameter in a shadow; moments have other prefixes."""

DERIVED_PREFIX = "derived/"
"""Before the name of a tensor that a device computed for the checkpoint."""

_LENGTH_BYTES = 8
_SHOWN_NAMES = 3


def read_tensors(data: bytes | bytearray, source: str, prefix: str = "") -> dict[str, Float32Array]:
    """The fp32 tensors of a safetensors file whose names start with ``prefix``, by the rest of their names.

    They are views on ``data``, which stays in memory as long as one of them does.

    Args:
        data: the whole file.
        source: what errors call the file.
        prefix: other tensors are not even looked at.

    Raises:
        ExportError: the header is broken, or such a tensor is not fp32 or does not lie inside the file.
    """
    header_bytes = int.from_bytes(data[:_LENGTH_BYTES], "little")
    if len(data) < _LENGTH_BYTES or header_bytes > min(MAX_HEADER_BYTES, len(data) - _LENGTH_BYTES):
        raise ExportError(
            f"{source} announces a header of {header_bytes} bytes in a file of {len(data)} bytes; nothing was published"
        )
    data_start = _LENGTH_BYTES + header_bytes
    try:
        header = dict(json.loads(data[_LENGTH_BYTES:data_start]))
    except (ValueError, TypeError) as error:
        raise ExportError(f"the header of {source} is not a JSON mapping: {error}; nothing was published") from error
    header.pop("__metadata__", None)
    return {
        name.removeprefix(prefix): _view(data, data_start, f"{name} of {source}", entry)
        for name, entry in sorted(header.items())
        if name.startswith(prefix)
    }


def tensor_sha256(tensor: Float32Array) -> str:
    """Hexadecimal sha256 of a tensor's bytes in row-major order."""
    return hashlib.sha256(np.ascontiguousarray(tensor).data).hexdigest()


class PartJoiner:
    """Collects parameters part by part; each part's file may be dropped after :meth:`add`."""

    def __init__(self, parameter_names: Iterable[str]) -> None:
        """``parameter_names`` are the names that the parts must hold together, no more and no fewer."""
        self._expected = frozenset(parameter_names)
        self._tensors: dict[str, Float32Array] = {}
        self._sha256: dict[str, str] = {}
        self._source: dict[str, str] = {}

    def add(self, source: str, tensors: dict[str, Float32Array]) -> None:
        """Take a copy of one part's parameters.

        Several stages may hold a parameter, and all of them report it; their bytes must be the same.

        Raises:
            ExportError: a parameter is not expected, is not finite, or differs from another holder's.
        """
        for name, tensor in tensors.items():
            if name not in self._expected:
                raise ExportError(
                    f"{source} holds {name}, which is none of the job's {len(self._expected)} parameters; "
                    "nothing was published"
                )
            if name in self._tensors:
                self._require_equal(name, source, tensor)
                continue
            num_bad = int(tensor.size - np.count_nonzero(np.isfinite(tensor)))
            if num_bad:
                raise ExportError(
                    f"{name} of {source} has {num_bad} of {tensor.size} values that are not finite; nothing was "
                    "published: go on from an earlier checkpoint with a lower training.lr or max_grad_norm"
                )
            self._tensors[name] = tensor.copy()
            self._sha256[name] = tensor_sha256(tensor)
            self._source[name] = source

    def joined(self) -> tuple[dict[str, Float32Array], dict[str, str]]:
        """All parameters and the sha256 of each one's bytes as its stage sent them, both by global name.

        Raises:
            ExportError: a parameter is in no part.
        """
        missing = sorted(self._expected - self._tensors.keys())
        if missing:
            raise ExportError(
                f"the stages' parts lack {len(missing)} of {len(self._expected)} parameters, first "
                f"{', '.join(missing[:_SHOWN_NAMES])}; nothing was published: a stage's shadow of this step is missing"
            )
        return self._tensors, self._sha256

    def _require_equal(self, name: str, source: str, tensor: Float32Array) -> None:
        first = self._tensors[name]
        if first.shape == tensor.shape and self._sha256[name] == tensor_sha256(tensor):
            return
        if first.shape != tensor.shape:
            how = f"shape {list(first.shape)} in the one, {list(tensor.shape)} in the other"
        else:
            num_different = int(np.count_nonzero(first.view(np.uint32) != tensor.view(np.uint32)))
            largest = float(np.abs(first.astype(np.float64) - tensor).max())
            how = f"{num_different} of {first.size} values differ, by up to {largest:.3g}"
        raise ExportError(
            f"{name} is not the same in {self._source[name]} and {source}: {how}; nothing was published: its holders "
            "have drifted apart, go back to an earlier step"
        )


def _view(data: bytes | bytearray, data_start: int, what: str, entry: Any) -> Float32Array:
    try:
        dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if not all(type(number) is int and number >= 0 for number in (*shape, start, end)):
            raise ValueError("sizes must be whole numbers from 0")
    except (KeyError, TypeError, ValueError) as error:
        raise ExportError(f"the header's entry of {what} is broken ({error!r}); nothing was published") from error
    if dtype != "F32":
        raise ExportError(f"{what} is {dtype}; parameters are F32. Nothing was published")
    if end - start != 4 * math.prod(shape) or data_start + end > len(data):
        raise ExportError(
            f"{what} has shape {list(shape)} in bytes {start} to {end} of {len(data) - data_start}; "
            "nothing was published"
        )
    return np.frombuffer(data, "<f4", math.prod(shape), data_start + start).reshape(shape)
