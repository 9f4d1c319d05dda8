"""Where a stage's weights come from: single tensors of a model's safetensors files, and never more than asked for.

:class:`LocalSource` reads a model folder on this device, :class:`RangeSource` asks somebody else for byte ranges of its
files. Both read straight into the tensor's own memory: a mapped file would count in the worker's resident memory with
every page that was touched, whatever stage the page belongs to.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from plutino.errors import ModelError
from plutino.safetensors_index import TensorEntry, read_safetensors_headers

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""Floating dtypes a weight may be stored in, by the names of the safetensors format."""

_INTEGER_DTYPES: dict[str, torch.dtype] = {"I32": torch.int32, "U8": torch.uint8, "I8": torch.int8}
"""What checkpoints store quantised weights in; given as they are and never converted."""

CONVERSION_BYTES = 16 << 20
"""Stored bytes that are held while a tensor is converted: more are read piece by piece."""

RANGE_BYTES = 4 << 20
"""Longest range asked for at once, so that beside the tensor itself only so much is held while it comes in."""


class TensorSource(Protocol):
    """Gives the configuration of a model and, one by one, its stored tensors."""

    def config(self) -> dict[str, Any]:
        """Content of the model's config.json."""

    def names(self) -> set[str]:
        """Names of all stored tensors."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a stored tensor, without reading it."""

    def read(self, name: str, dtype: torch.dtype | None) -> Tensor:
        """A stored tensor in memory of its own, converted to ``dtype``; None: as it is stored.

        Raises:
            ModelError: no such tensor, a dtype that is not a floating one, or its bytes cannot be read.
        """

    def read_rows(self, name: str, start_row: int, end_row: int, dtype: torch.dtype | None) -> Tensor:
        """Rows ``[start_row, end_row)`` of a stored tensor; otherwise as :meth:`read`."""

    @property
    def bytes_read(self) -> int:
        """Stored bytes read so far."""


@runtime_checkable
class ReadsAhead(Protocol):
    """A source that can begin to obtain tensors before they are read."""

    def prepare(self, names: Iterable[str]) -> None:
        """These stored tensors will be read, in this order."""


class SafetensorsSource(ABC):
    """The decoding that all sources of safetensors bytes share."""

    def __init__(self, index: Mapping[str, TensorEntry]) -> None:
        self._index = index
        self._bytes_read = 0

    @property
    def bytes_read(self) -> int:
        """Stored bytes read so far."""
        return self._bytes_read

    def names(self) -> set[str]:
        """Names of all stored tensors."""
        return set(self._index)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a stored tensor."""
        return self._entry(name).shape

    def read(self, name: str, dtype: torch.dtype | None) -> Tensor:
        """See :meth:`TensorSource.read`."""
        shape = self._entry(name).shape
        num_rows = shape[0] if shape else 1
        return self.read_rows(name, 0, num_rows, dtype)

    def read_rows(self, name: str, start_row: int, end_row: int, dtype: torch.dtype | None) -> Tensor:
        """See :meth:`TensorSource.read_rows`."""
        entry = self._entry(name)
        stored_dtype = _stored_dtype(name, entry, wants_integers=dtype is None or not dtype.is_floating_point)
        row_bytes = math.prod(entry.shape[1:]) * stored_dtype.itemsize
        assert 0 <= start_row <= end_row <= (entry.shape[0] if entry.shape else 1)
        wanted = torch.empty((end_row - start_row, *entry.shape[1:]), dtype=dtype or stored_dtype)
        if entry.end - entry.start != row_bytes * (entry.shape[0] if entry.shape else 1):
            raise ModelError(
                f"tensor {name} of {entry.file} should have rows of {row_bytes} bytes but its range has "
                f"{entry.end - entry.start} in all; download the file again"
            )
        # One row at least, and all of them where nothing is converted.
        step = max(1, CONVERSION_BYTES // max(row_bytes, 1)) if wanted.dtype != stored_dtype else max(1, len(wanted))
        for first in range(0, len(wanted), step):
            rows = wanted[first : first + step]
            stored = rows if rows.dtype == stored_dtype else torch.empty(rows.shape, dtype=stored_dtype)
            target = stored.reshape(-1).view(torch.uint8).numpy().data
            self._fill(target, entry.file, entry.start + (start_row + first) * row_bytes)
            self._bytes_read += stored.nbytes
            if stored is not rows:
                rows.copy_(stored)
        return wanted if entry.shape else wanted.reshape(())

    def _entry(self, name: str) -> TensorEntry:
        try:
            return self._index[name]
        except KeyError:
            raise ModelError(f"the model has no tensor {name} among its {len(self._index)}") from None

    @abstractmethod
    def _fill(self, target: memoryview, file: str, start: int) -> None:
        """Fill the whole of ``target`` with a file's bytes from ``start`` on."""


def _stored_dtype(name: str, entry: TensorEntry, *, wants_integers: bool) -> torch.dtype:
    known = DTYPES | _INTEGER_DTYPES if wants_integers else DTYPES
    if entry.dtype not in known:
        raise ModelError(
            f"tensor {name} of {entry.file} is stored as {entry.dtype}; plutino loads {', '.join(sorted(known))}: "
            "use the unquantised model"
        )
    return known[entry.dtype]


class LocalSource(SafetensorsSource):
    """Tensors of a model folder on this device.

    Raises:
        ModelError: the folder has no readable config.json or safetensors files.
    """

    def __init__(self, model_dir: str | Path) -> None:
        self._model_dir = Path(model_dir)
        super().__init__(read_safetensors_headers(self._model_dir))

    def config(self) -> dict[str, Any]:
        """Content of the folder's config.json."""
        path = self._model_dir / "config.json"
        try:
            values = json.loads(path.read_bytes())
        except OSError as error:
            raise ModelError(f"cannot read {path}: {error.strerror}") from error
        except ValueError as error:
            raise ModelError(f"{path} is not valid JSON: {error}") from error
        if not isinstance(values, dict):
            raise ModelError(f"{path} must hold a mapping, not {type(values).__name__}")
        return values

    def _fill(self, target: memoryview, file: str, start: int) -> None:
        path = self._model_dir / file
        try:
            # Unbuffered, so that the bytes go straight into the tensor; opened anew, so that nothing needs closing.
            with path.open("rb", buffering=0) as opened:
                opened.seek(start)
                done = 0
                while done < len(target):  # one call moves at most 2 GiB on Linux
                    count = opened.readinto(target[done:])
                    if not count:
                        raise ModelError(f"{path} ends at byte {start + done}, inside a tensor; download it again")
                    done += count
        except OSError as error:
            raise ModelError(f"cannot read {path}: {error.strerror}") from error


class RangeSource(SafetensorsSource):
    """Tensors whose bytes somebody else hands out.

    Args:
        config: content of the model's config.json.
        index: where each tensor lies.
        read_range: gives bytes [start, end) of a file; asked for at most ``RANGE_BYTES`` at once, in rising order
            within a tensor.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        index: Mapping[str, TensorEntry],
        read_range: Callable[[str, int, int], bytes | bytearray | memoryview],
    ) -> None:
        super().__init__(index)
        self._config = dict(config)
        self._read_range = read_range

    def config(self) -> dict[str, Any]:
        """Content of the model's config.json."""
        return dict(self._config)

    def _fill(self, target: memoryview, file: str, start: int) -> None:
        for offset in range(0, len(target), RANGE_BYTES):
            piece = target[offset : offset + RANGE_BYTES]
            data = memoryview(self._read_range(file, start + offset, start + offset + len(piece))).cast("B")
            if len(data) != len(piece):
                raise ModelError(
                    f"asked for {len(piece)} bytes of {file} from byte {start + offset} but got {len(data)}; "
                    "the base model's files differ from their index"
                )
            piece[:] = data
