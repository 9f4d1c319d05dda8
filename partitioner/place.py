"""Where in a pipeline a worker stands, as far as its memory depends on it.

Entry point: :func:`place_of`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ReplicaShare:
    """What one replica of a stage has of the step."""

    in_flight: int
    """Micro-batches between their forward and their backward pass here, at most."""
    gradient_copies: int
    """Gradients of single micro-batches that wait here for the sum over replicas."""
    num_peers: int
    """Workers it exchanges tensors with."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where in a pipeline a worker stands, as far as its memory depends on it."""

    num_stages: int
    is_first: bool
    is_last: bool
    in_flight: int | Ints
    """An array prices many places at once; such a place is no key."""
    gradient_copies: int
    num_peers: int


def place_of(num_stages: int, stage_index: int, num_micro_batches: int, share: ReplicaShare | None = None) -> Place:
    """The place of a stage's only worker, or of a replica with its share."""
    is_first, is_last = stage_index == 0, stage_index == num_stages - 1
    return Place(
        num_stages=num_stages,
        is_first=is_first,
        is_last=is_last,
        in_flight=share.in_flight if share else micro_batches_in_flight(num_stages, stage_index, num_micro_batches),
        gradient_copies=share.gradient_copies if share else int(num_micro_batches > 1),
        num_peers=share.num_peers if share else (not is_first) + (not is_last),
    )


def micro_batches_in_flight(num_stages: int, stage_index: int, num_micro_batches: int) -> int:
    """Micro-batches between their forward and their backward pass on one stage, at most, under 1F1B."""
    return min(num_stages - stage_index, num_micro_batches)
