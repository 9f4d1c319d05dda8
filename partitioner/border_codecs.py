"""Which boundaries of a plan carry bf16 and which the hidden states as they are.

Entry point: :func:`least_lossy`. A search compares plans whose boundaries all have one codec; where the lossy one won,
each boundary that hardly gains by it goes back to what it was.
"""

from __future__ import annotations

from partitioner.exact import TOLERANCE
from partitioner.pricing import Candidate, Pricer

_BORDER_SHARE = 0.005
"""A boundary that saves less than this share of the step stays as it is."""


def least_lossy(best: Candidate, pricer: Pricer) -> tuple[Candidate, Pricer]:
    """The same stages with fewer boundaries in bf16; unchanged where that is not what they carry.

    Boundaries are tried from the last one on. Memory is then billed as if every boundary carried what the most costly
    one does: where that does not fit, all of them stay in bf16.
    """
    shape = pricer.shape
    if shape.codec != "bf16" or shape.dtype != "fp32" or shape.side_reduction or len(best.layout) == 1:
        return best, pricer
    limit_s = best.step_s * (1 + TOLERANCE)
    borders = best.cuts[1:-1]
    for border in reversed(best.cuts[1:-1]):
        fewer = tuple(other for other in borders if other != border)
        changed = shape.model_copy(update={"codec": "raw", "bf16_borders": fewer})
        tried = Pricer(pricer.table, changed, pricer.devices, pricer.links)
        found = tried.candidate(best.layout, best.cuts)
        if found is None or found.checkpointing != best.checkpointing:
            continue
        if found.step_s <= limit_s * (1 + _BORDER_SHARE):
            # What a boundary may cost is counted once: the next one is compared with this.
            best, pricer, borders = found, tried, fewer
            limit_s = max(limit_s, found.step_s)
    return best, pricer
