"""What malloc keeps of blocks that were freed: resident memory that no tensor accounts for.

glibc (2.36) cannot put an aligned block into a hole of its own size, which neighbours that still live bound. A block
with a mapping of its own leaves no hole. What is recomputed comes and goes block by block, each time into new places:
on the heap it leaves what it would without checkpointing. tests/numerics/recompute_peak.py measures it: resident set
less live tensors of 8 blocks of width 768 and LoRA of rank 16, beyond :data:`FLOOR_BYTES`, in MiB,

| tokens, how tensors lie       | kept | recomputed |
| 64, too small for mappings    |   17 |         20 |
| 256, mapped                   |      |          0 |
| 256, on the heap              |  149 |        154 |
| 512, on the heap              |      |        271 |
"""

from __future__ import annotations

import numpy as np

from partitioner.place import Ints

MAPPED_SHARE = 0.12
"""Of all that comes and goes, where tensors have mappings of their own."""

SMALL_SHARE = 1.1
"""Of what passes of micro-batches make, recomputed blocks included, where hidden states are too small for mappings:
gradients and snapshots are of their sizes, and find places among them."""

REUSE_SHARE = 1.05
"""Of the same with gradients, snapshots and kept products, where malloc is told to serve large tensors from the heap,
too. Without the products a worker of many lengths in bf16 held 8 MiB more than its bill (docs/log.md, 2026-11-23)."""

FLOOR_BYTES = 16 << 20
"""Scratch space of matrix products and pieces of arenas that a worker of any size takes (benchmarks/memory.py)."""


def mapped_bytes(passing_bytes: Ints) -> Ints:
    """What is kept of so much that comes and goes, where it has mappings."""
    return FLOOR_BYTES + (MAPPED_SHARE * passing_bytes).astype(np.int64)


def small_bytes(passing_bytes: Ints, recomputed_bytes: Ints) -> Ints:
    """The same where tensors are too small for mappings.

    Args:
        passing_bytes: the most that comes and goes with micro-batches.
        recomputed_bytes: what recomputing makes and drops of one micro-batch beyond these.
    """
    return FLOOR_BYTES + (SMALL_SHARE * (passing_bytes + recomputed_bytes)).astype(np.int64)


def reuse_bytes(passing_bytes: Ints, recomputed_bytes: Ints, other_bytes: Ints) -> Ints:
    """The same where malloc keeps every freed block on the heap.

    Args:
        passing_bytes: the most that comes and goes with micro-batches.
        recomputed_bytes: what recomputing makes and drops of one micro-batch beyond these.
        other_bytes: gradients, snapshots, and what a library keeps of products and replaces.
    """
    return FLOOR_BYTES + (REUSE_SHARE * (passing_bytes + recomputed_bytes + other_bytes)).astype(np.int64)
