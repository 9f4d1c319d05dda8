"""What every link between a plan's workers carries in a step: hidden states and their gradients, sums of gradients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

from partitioner.plan import LinkUse
from partitioner.pricing import Candidate, Pricer
from partitioner.shared_sums import shared_sums
from partitioner.sum_path import link_uses as sum_uses


def link_uses(pricer: Pricer, best: Candidate) -> tuple[LinkUse, ...]:
    """Boundaries first, from the first stage on, then replicas and stages that add up gradients together."""
    sums: Counter[tuple[int, int]] = Counter()
    for k, group in enumerate(best.layout):
        if len(group) > 1:
            num_bytes = pricer.sum_bytes(best.layout, k, best.cuts[k], best.cuts[k + 1])
            uses = sum_uses(pricer.sum_owners(best.layout, k), len(group))
            sums.update({(group[i], group[j]): count * num_bytes for (i, j), count in uses.items()})
    for num_bytes, shared in shared_sums(pricer, best.layout):
        sums.update({pair: count * num_bytes for pair, count in shared.items()})
    return (*_boundaries(pricer, best), *_sums(pricer, sums))


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


def _sums(pricer: Pricer, sent_bytes: Counter[tuple[int, int]]) -> Iterator[LinkUse]:
    """Bytes from one device to another, as one line for both ways."""
    for pair in dict.fromkeys((min(pair), max(pair)) for pair, num_bytes in sent_bytes.items() if num_bytes):
        down_bytes, up_bytes = sent_bytes[pair], sent_bytes[pair[::-1]]
        busy_s = max(down_bytes, up_bytes) / float(pricer.bandwidth[pair])
        yield _use(pricer, pair, carries="sums of gradients", down_bytes=down_bytes, up_bytes=up_bytes, busy_s=busy_s)


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
