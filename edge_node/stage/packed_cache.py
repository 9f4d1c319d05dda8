"""Packed matrices of earlier jobs in the device's disk cache, so that a second job on a model starts at once.

A blob is one matrix as safetensors. It is named by the hash of all that its bytes follow from: the base model's own
hash, the matrix, the scheme, and the version of the packed form.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping

from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from edge_node.cache import BlobCache
from plutino.errors import AgentError

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
