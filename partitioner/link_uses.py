"""What every link between a plan's workers carries in a step: hidden states and their gradients, sums of replicas."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

from partitioner.plan import LinkUse
from partitioner.pricing import Candidate, Pricer
from partitioner.sum_path import link_uses as sum_uses


def link_uses(pricer: Pricer, best: Candidate) -> tuple[LinkUse, ...]:
    """Boundaries first, from the first stage on, then the replicas of each stage."""
    return (*_boundaries(pricer, best), *_sums(pricer, best))


def _boundaries(pricer: Pricer, best: Candidate) -> Iterator[LinkUse]:
    for k, (group, below) in enumerate(pairwise(best.layout)):
        here, there = best.groups[k], best.groups[k + 1]
        gets_gradient = here.replicas[0].gets_gradient
        is_rounded = pricer.codec_at(best.cuts[k + 1]) == "bf16"
        for (i, j), count in sorted(Counter(zip(here.owners, there.owners, strict=True)).items()):
            num_bytes = count * (pricer.rounded_bytes if is_rounded else pricer.message_bytes)
            yield _use(
                pricer,
                (group[i], below[j]),
                down_bytes=num_bytes,
                up_bytes=num_bytes if gets_gradient else 0,
                busy_s=count * here.links[i][j][0],
            )


def _sums(pricer: Pricer, best: Candidate) -> Iterator[LinkUse]:
    """The running sum goes from owner to owner of the micro-batches, and the total back: partitioner.sum_path."""
    for k, group in enumerate(best.layout):
        if len(group) == 1 or not best.groups[k].sum_s:
            continue
        num_bytes = pricer.sum_bytes(best.layout, k, best.cuts[k], best.cuts[k + 1])
        uses = sum_uses(pricer.sum_owners(best.layout, k), len(group))
        for i, j in sorted({(min(pair), max(pair)) for pair in uses}):
            most = max(uses[i, j], uses[j, i])
            pair = (group[i], group[j])
            yield _use(
                pricer,
                pair,
                carries="sums of gradients",
                down_bytes=uses[i, j] * num_bytes,
                up_bytes=uses[j, i] * num_bytes,
                busy_s=most * num_bytes / float(pricer.bandwidth[pair]),
            )


def _use(pricer: Pricer, pair: tuple[int, int], **figures: object) -> LinkUse:
    one, other = (pricer.devices[i] for i in pair)
    known = {
        "from_device": one.name,
        "to_device": other.name,
        "bandwidth_bytes_per_s": float(pricer.bandwidth[pair]),
        "latency_s": float(pricer.latency_s[pair]),
        "how_known": pricer.links.how_known(one, other),
    }
    return LinkUse.model_validate(known | figures)
