"""Models whose weights are drawn instead of stored: for benchmarks of sizes that nobody wants on a disk.

A model folder says so itself, with a file :data:`RANDOM_FILE` in the place of safetensors:
``{"seed": 0, "dtype": "BF16", "shapes": {tensor: shape}}``. Whoever reads the tensors sees them in a file that is
called ``random:SEED``; workers draw them, the same for the same seed and name.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path

from plutino.errors import ModelError
from plutino.safetensors_index import DTYPE_BYTES, TensorEntry

RANDOM_FILE = "random_weights.json"
_PREFIX = "random:"


def read_random_weights(folder: Path) -> dict[str, TensorEntry] | None:
    """The tensors of a folder whose weights are drawn, in name order; None: they are stored.

    Raises:
        ModelError: the folder's file is malformed.
    """
    path = folder / RANDOM_FILE
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_bytes())
        seed, dtype, shapes = int(values["seed"]), str(values["dtype"]), values["shapes"]
        entries: dict[str, TensorEntry] = {}
        at = 0
        for name, shape in sorted(shapes.items()):
            end = at + math.prod(shape) * DTYPE_BYTES[dtype]
            entries[name] = TensorEntry(f"{_PREFIX}{seed}", dtype, tuple(map(int, shape)), at, end)
            at = end
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} does not describe random weights: {error!r}; write it anew") from error
    return entries


def seed_of(tensors: Mapping[str, TensorEntry]) -> int | None:
    """The seed that a model's weights are drawn from; None: they are stored."""
    files = {entry.file for entry in tensors.values()}
    drawn = {file for file in files if file.startswith(_PREFIX)}
    return int(min(drawn).removeprefix(_PREFIX)) if drawn == files and len(files) == 1 else None


def drawn_digests(tensors: Mapping[str, TensorEntry]) -> dict[str, str]:
    """Stands for the sha256 of each drawn tensor: of what its bytes follow from."""
    return {
        name: hashlib.sha256(f"{entry.file} {entry.dtype} {list(entry.shape)} {name}".encode()).hexdigest()
        for name, entry in tensors.items()
    }
