"""Which boundaries of a plan carry bf16 and which the hidden states as they are.

Entry point: :func:`least_lossy`. A search compares plans whose boundaries all have one codec; where the lossy one won,
each boundary that hardly gains by it goes back to what it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from partitioner.pricing import Candidate, Pricer
from partitioner.replay import replay

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
    borders = list(best.cuts[1:-1])
    mixed = _pricer_with(pricer, borders)
    found = mixed.candidate(best.layout, best.cuts)
    if found is None or found.checkpointing != best.checkpointing:
        return best, pricer
    groups, limit_s = list(found.groups), best.step_s
    for k in reversed(range(len(groups) - 1)):
        exact = replace(groups[k], links=mixed.links_below(best.layout, k, is_rounded=False))
        step_s = replay([*groups[:k], exact, *groups[k + 1 :]], mixed.num_micro_batches).step_s
        if step_s <= limit_s * (1 + _BORDER_SHARE):
            # What a boundary costs is counted once: the next one is compared with this.
            groups[k], limit_s = exact, max(limit_s, step_s)
            borders.remove(best.cuts[k + 1])
    if len(borders) == len(groups) - 1:
        return best, pricer
    chosen = _pricer_with(pricer, borders)
    candidate = chosen.candidate(best.layout, best.cuts)
    assert candidate is not None, "its memory is that of the one that fitted"
    return candidate, chosen


def _pricer_with(pricer: Pricer, borders: Sequence[int]) -> Pricer:
    shape = pricer.shape.model_copy(update={"codec": "raw", "bf16_borders": tuple(borders)})
    return pricer.of_shape(shape)
