"""Where a stage's weights come from: single tensors of a model's safetensors files, and never more than asked for.

:class:`LocalSource` reads a model folder on this device, :class:`RangeSource` asks somebody else for byte ranges of its
files. Both read straight into the tensor's own memory: a mapped file would count in the worker's resident memory with
every page that was touched, whatever stage the page belongs to.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

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

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """A stored tensor in memory of its own, converted to ``dtype``.

        Raises:
            ModelError: no such tensor, a dtype that is not a floating one, or its bytes cannot be read.
        """

    @property
    def bytes_read(self) -> int:
        """Stored bytes read so far."""


class _SafetensorsSource(ABC):
    """The decoding that all sources of safetensors bytes share."""

    def __init__(self, index: Mapping[str, TensorEntry]) -> None:
        self._index = index
        self._bytes_read = 0

    @property
    def bytes_read(self) -> int:
        return self._bytes_read

    def names(self) -> set[str]:
        return set(self._index)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        entry = self._entry(name)
        if entry.dtype not in DTYPES:
            raise ModelError(
                f"tensor {name} of {entry.file} is stored as {entry.dtype}; plutino loads {', '.join(sorted(DTYPES))}: "
                "use the unquantised model"
            )
        stored = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        if stored.nbytes != entry.end - entry.start:
            raise ModelError(
                f"tensor {name} of {entry.file} should have {stored.nbytes} bytes but its range has "
                f"{entry.end - entry.start}; download the file again"
            )
        self._fill(stored.reshape(-1).view(torch.uint8).numpy().data, entry.file, entry.start)
        self._bytes_read += stored.nbytes
        return stored.to(dtype)

    def _entry(self, name: str) -> TensorEntry:
        try:
            return self._index[name]
        except KeyError:
            raise ModelError(f"the model has no tensor {name} among its {len(self._index)}") from None

    @abstractmethod
    def _fill(self, target: memoryview, file: str, start: int) -> None:
        """Fill the whole of ``target`` with a file's bytes from ``start`` on."""


class LocalSource(_SafetensorsSource):
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


class RangeSource(_SafetensorsSource):
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
