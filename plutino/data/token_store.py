"""Tokens of a whole data set in a temporary file instead of memory; the system keeps in memory what is used of it."""

from __future__ import annotations

import tempfile
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray


class TokenStore:
    """Collects the tokens and label masks of rows; a context manager that closes its files.

    The files have no name (they end with the process) and lie in ``TMPDIR``: 5 bytes a token.
    """

    def __init__(self) -> None:
        # Closed by __exit__; what finish() mapped outlives that.
        self._ids = tempfile.TemporaryFile(prefix="plutino-ids-")  # noqa: SIM115
        self._mask = tempfile.TemporaryFile(prefix="plutino-mask-")  # noqa: SIM115
        self._num_tokens = 0

    def __enter__(self) -> TokenStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ids.close()
        self._mask.close()

    def append(self, ids: NDArray[np.int32], mask: NDArray[np.uint8]) -> None:
        """Add a row."""
        self._ids.write(ids.astype("<i4", copy=False).tobytes())
        self._mask.write(mask.tobytes())
        self._num_tokens += len(ids)

    def finish(self) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        """All tokens and masks, [tokens] each, mapped from the files; at least one token was added."""
        self._ids.flush()
        self._mask.flush()
        return self._map(self._ids, np.dtype(np.int32)), self._map(self._mask, np.dtype(np.uint8))

    def _map(self, file: Any, dtype: np.dtype[Any]) -> NDArray[Any]:
        # As a plain array: numpy would carry the map's type into every slice and sum.
        return np.asarray(np.memmap(file, dtype=dtype, mode="r", shape=(self._num_tokens,)))
