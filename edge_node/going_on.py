"""What a worker's process keeps between two plans of one job: what it trained, and nothing of the model.

At a move no worker has failed: instead of ending, each gives its stage back and waits, with its imports done and its
training state at hand. In the next plan it reads from storage only what others trained. States are named by the sha256
of the shadow that they would be, so that a state of another step is never taken for the one that is asked for.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from edge_node.compute_device import ComputeDevice
from edge_node.quantize.workspace import release_workspace
from edge_node.shadowing import safetensors_pieces
from plutino.sizes import MIB, format_size

logger = logging.getLogger(__name__)

MOST_LEFT_BYTES = 64 * MIB
"""What may be left of a stage that was given back: 23 to 33 MiB were measured, of stages of 300 MiB. A process that
keeps more ends, and another one starts anew."""
WAITS_S = 60.0
"""A plan is made and its workers are asked for in seconds; a process that hears of none ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptState:
    """The training state of the parameters that a worker had."""

    job_id: str
    by_sha256: Mapping[str, Mapping[str, Tensor]] = field(repr=False)
    """Tensors as a shadow holds them, by the sha256 of its file."""

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.nbytes for tensors in self.by_sha256.values() for tensor in tensors.values())


def keep_state(job_id: str, snapshot: Mapping[str, Tensor]) -> KeptState:
    """Keep a snapshot under the name that its shadow has; all replicas of a stage find the same one."""
    if not snapshot:
        return KeptState(job_id=job_id, by_sha256={})
    digest = hashlib.sha256()
    for piece in safetensors_pieces(snapshot):
        digest.update(piece)
    return KeptState(job_id=job_id, by_sha256={digest.hexdigest(): snapshot})


def left_after_release(device: ComputeDevice, baseline_bytes: int, kept_bytes: int) -> int:
    """Give back what is free; bytes that the process then holds beyond those of a new one and what it keeps."""
    release_workspace()
    device.release()
    left_bytes = max(0, device.held_bytes() - baseline_bytes - (0 if device.is_cuda else kept_bytes))
    logger.info("%s of the stage are left in this process", format_size(left_bytes))
    return left_bytes
