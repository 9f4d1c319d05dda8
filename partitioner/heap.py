"""What malloc keeps of blocks that were freed: resident memory that no tensor accounts for.

glibc (2.36) cannot put an aligned block into a hole of its own size, which a neighbour that still lives bounds. A block
with a mapping of its own leaves none. What is recomputed comes and goes block by block, each time into new places, so
that on the heap it takes what it would without checkpointing (measured, resident set less live tensors, 8 blocks of
width 768, MiB: 256 tokens and mappings 16 with checkpointing; on the heap 142 with and 131 without; 64 tokens, whose
hidden states are too small for mappings, 31 to 46 either way; benchmarks/memory.py has the large stages).
"""

from __future__ import annotations

import numpy as np

from partitioner.place import Ints

MAPPED_SHARE = 0.12
"""Of all that comes and goes, where tensors have mappings of their own."""

HEAP_SHARE = 1.1
"""Of the same, and of all blocks that are recomputed, where tensors lie on the heap: faster, because no page is faulted
in twice, and fuller."""

FLOOR_BYTES = 16 << 20
"""Scratch space of matrix products and pieces of arenas that a worker of any size takes (benchmarks/memory.py)."""


def kept_bytes(passing_bytes: Ints, recomputed_bytes: Ints, *, on_heap: bool) -> Ints:
    """Bytes that malloc keeps at the most.

    Args:
        passing_bytes: the most that comes and goes at once.
        recomputed_bytes: what recomputing makes and drops of one micro-batch beyond these.
        on_heap: whether tensors lie there, or have mappings of their own.
    """
    if on_heap:
        return FLOOR_BYTES + (HEAP_SHARE * (passing_bytes + recomputed_bytes)).astype(np.int64)
    return FLOOR_BYTES + (MAPPED_SHARE * passing_bytes).astype(np.int64)
