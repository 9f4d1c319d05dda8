"""Packed matrices of earlier jobs in the device's disk cache, so that a second job on a model starts at once.

A blob is one matrix as safetensors. It is named by the hash of all that its bytes follow from: the base model's own
hash, the matrix, the scheme, and the version of the packed form.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping
from typing import Protocol

from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from edge_node.cache import BlobCache
from plutino.errors import AgentError
from plutino.manifest import packed_name

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
"""Raised with every change to a scheme's packed tensors or to how they are computed."""


class PackedBlobs:
    """The packed matrices of one base model; see :class:`edge_node.stage.packing.PackedCache`.

    Args:
        blobs: the device's cache.
        base_hash: hash of the base model's files.
    """

    def __init__(self, blobs: BlobCache, base_hash: str) -> None:
        self._blobs = blobs
        self._base_hash = base_hash
        self._is_writable = True

    def load(self, name: str, scheme: str) -> dict[str, Tensor] | None:
        """Packed tensors of a matrix, to the bit; None if they are not here."""
        try:
            path = self._blobs.lookup(self._key(name, scheme))
            return None if path is None else load_safetensors(path.read_bytes())
        except FileNotFoundError:
            return None  # evicted between the two
        except (AgentError, SafetensorError, OSError) as error:
            logger.warning("%s is packed anew: %s", name, error)
            return None

    def holds(self, name: str, scheme: str) -> bool:
        """Whether packed tensors of a matrix lie here; their bytes are not looked at."""
        return self._blobs.has_name(self._key(name, scheme))

    def prepare(self, name: str, scheme: str) -> None:
        """They are here."""

    def save(self, name: str, scheme: str, packed: Mapping[str, Tensor]) -> None:
        """Keep packed tensors; a full or failing disk costs the next job time, and this one nothing."""
        if not self._is_writable:
            return
        on_cpu = {key: tensor.cpu().contiguous() for key, tensor in packed.items()}
        try:
            self._blobs.put(self._key(name, scheme), [save_safetensors(on_cpu)])
        except AgentError as error:
            logger.warning("packed weights of this job are not kept: %s", error)
            self._is_writable = False

    def _key(self, name: str, scheme: str) -> str:
        parts = ("plutino packed weights", str(FORMAT_VERSION), self._base_hash, scheme, name)
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


class PackedSource(Protocol):
    """Gives packed tensors from elsewhere."""

    def names(self) -> set[str]:
        """Of all of them."""

    def read(self, name: str, dtype: None) -> Tensor:
        """One as it is stored."""

    def prepare(self, names: Iterable[str]) -> None:
        """These will be read, in this order."""


class ShippedMatrices:
    """Packed matrices that the coordinator made, obtained like stored tensors; see PackedCache in ``packing.py``.

    Args:
        own: what this device packed itself.
        shipped: gives the coordinator's packed tensors by :func:`plutino.manifest.packed_name`.
    """

    def __init__(self, own: PackedBlobs, shipped: PackedSource) -> None:
        self._own = own
        self._shipped = shipped
        self._parts: dict[tuple[str, str], dict[str, str]] = {}
        for name in sorted(shipped.names()):
            matrix, scheme, part = name.rsplit(".", 2)
            assert name == packed_name(matrix, scheme, part)
            self._parts.setdefault((matrix, scheme), {})[part] = name

    def load(self, name: str, scheme: str) -> dict[str, Tensor] | None:
        """Packed tensors of a matrix, to the bit; None if nobody has packed it."""
        own = self._own.load(name, scheme)
        if own is not None:
            return own
        parts = self._parts.get((name, scheme))
        return None if parts is None else {part: self._shipped.read(stored, None) for part, stored in parts.items()}

    def holds(self, name: str, scheme: str) -> bool:
        """Whether somebody has packed it."""
        return (name, scheme) in self._parts or self._own.holds(name, scheme)

    def prepare(self, name: str, scheme: str) -> None:
        """Begin to obtain a matrix that is not here."""
        if not self._own.holds(name, scheme):
            self._shipped.prepare(self._parts[name, scheme].values())

    def save(self, name: str, scheme: str, packed: Mapping[str, Tensor]) -> None:
        """Keep what was packed here after all."""
        self._own.save(name, scheme, packed)
