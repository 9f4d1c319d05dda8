"""What binds a plan, and what would relieve it: every way that is named was priced, on the fleet as it would be then.

Entry points: :func:`bottleneck`, :func:`reliefs`, :func:`in_words`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from partitioner.climb import Guesses, Limits, improve, polish, settle
from partitioner.device import DeviceProfile, LinkProfile, LinkTable
from partitioner.layout import Layout, replica_shares
from partitioner.pricing import Candidate, Pricer
from plutino.sizes import format_size

NOTABLE_SHARE = 0.02
"""What saves less than this share of the step is not worth a sentence, nor a lossy codec."""
_ROOMY_BYTES = 1 << 62
_FASTER = 2.0
_FREE = LinkProfile(bandwidth_bytes_per_s=1e18, latency_s=0.0)


@dataclass(frozen=True, slots=True)
class Relief:
    """A change of the job or the fleet, and what it would give."""

    what: str
    step_s: float
    """Of the plan as it would be then."""


def bottleneck(pricer: Pricer, best: Candidate) -> str:
    """Whatever takes longest in a step: a stage, the link behind one, or what is waited for of replicas' sums."""
    time, names = best.time, _stage_names(pricer, best.layout)
    k = _busiest(best)
    link = max(range(len(names) - 1), key=lambda k: time.link_busy_s[k], default=0)
    summed = max(range(len(names)), key=lambda k: best.groups[k].sum_s)
    link_s, sum_s = (time.link_busy_s[link] if time.link_busy_s else 0.0), best.groups[summed].sum_s
    if sum_s > max(time.busy_s[k], link_s):
        has_replicas = len(best.layout[summed]) > 1
        over = f"the replicas of stage {summed}, {names[summed]}" if has_replicas else "stages that share parameters"
        return f"the sum of gradients over {over}: {sum_s:.3g} s of the step's {best.step_s:.3g} s wait for it"
    if link_s > time.busy_s[k]:
        return (
            f"the link from {names[link]} to {names[link + 1]}: it carries messages for {link_s:.3g} s each way of "
            f"the step's {best.step_s:.3g} s ({pricer.num_micro_batches} micro-batches)"
        )
    return f"stage {k} on {names[k]}: it computes {time.busy_s[k]:.3g} s of the step's {best.step_s:.3g} s"


def reliefs(pricer: Pricer, best: Candidate, layouts: Sequence[Layout], limits: Limits) -> tuple[Relief, ...]:
    """Ways that shorten the step notably, the best first.

    Args:
        pricer: of the plan's micro-batch and codec.
        best: the plan, as it was compared with others.
        layouts: other good ones to start from.
        limits: which layouts are allowed.
    """
    seeds = (best.layout, *layouts)
    target_s = pricer.first_epoch(best).step_s * (1 - NOTABLE_SHARE)
    found = [
        _more_memory(pricer, best, seeds, limits),
        *_other_settings(pricer, best),
        _free_links(pricer, best),
        _faster_device(pricer, best, seeds, limits),
        _one_device_more(pricer, best, seeds, limits),
    ]
    return tuple(sorted((r for r in found if r is not None and r.step_s < target_s), key=lambda r: r.step_s))


def in_words(found: Sequence[Relief]) -> str:
    """The ways, the best first."""
    if not found:
        return (
            f"nothing of what was priced saves {NOTABLE_SHARE:.0%} of the step: more memory, the other codec, a "
            "network that costs nothing, the busiest device twice as fast, one device more like it"
        )
    return "; ".join(f"{relief.what}: {relief.step_s:.3g} s a step" for relief in found)


def _more_memory(pricer: Pricer, best: Candidate, seeds: Sequence[Layout], limits: Limits) -> Relief | None:
    roomy = [device.model_copy(update={"available_bytes": _ROOMY_BYTES}) for device in pricer.devices]
    freed = _best_on(pricer, roomy, best, seeds, limits, rounds=3)
    if freed is None:
        return None
    needs = []
    for k, group in enumerate(freed.layout):
        shares = replica_shares(freed.layout, k, freed.groups[k].owners, runs_ahead=pricer.shape.runs_ahead)
        for share, index in zip(shares, group, strict=True):
            device = pricer.devices[index]
            job_bytes = pricer.memory.job_bytes(
                freed.cuts[k],
                freed.cuts[k + 1],
                num_stages=len(freed.layout),
                stage_index=k,
                checkpointing=freed.checkpointing[k],
                share=share,
            )
            lacking_bytes = device.baseline_bytes + job_bytes - device.available_bytes
            if lacking_bytes > 0:
                needs.append(f"{format_size(lacking_bytes)} more memory on {device.name}")
    return Relief(" and ".join(needs), pricer.first_epoch(freed).step_s) if needs else None


def _other_settings(pricer: Pricer, best: Candidate) -> list[Relief]:
    """The job's own settings that send fewer bytes, and change its bits."""
    shape = pricer.shape
    changes: list[tuple[str, dict[str, object]]] = []
    # Of two streams between the halves of an encoder-decoder one alone could be rounded in place.
    if len(best.layout) > 1 and shape.dtype == "fp32" and shape.codec == "raw" and not pricer.table.num_encoder_blocks:
        changes.append(("placement.codec: bf16", {"codec": "bf16", "bf16_borders": ()}))
    if any(group.sum_s for group in best.groups) and shape.sums == "fp32":
        changes.append(("placement.sums: fp16", {"sums": "fp16"}))
    found = []
    for what, change in changes:
        other = pricer.of_shape(shape.model_copy(update={**change, "frozen_share": 1.0}))
        found.append(Relief(what, other.fixed(best.layout, best.cuts, best.checkpointing).step_s))
    return found


def _free_links(pricer: Pricer, best: Candidate) -> Relief | None:
    if not any(group.sum_s for group in best.groups) and len(best.layout) == 1:
        return None
    shape = pricer.shape.model_copy(update={"frozen_share": 1.0})
    free = Pricer(pricer.table, shape, pricer.devices, LinkTable(same_host=_FREE, other=_FREE))
    step_s = free.fixed(best.layout, best.cuts, best.checkpointing).step_s
    return Relief("a faster network, at best (links that cost nothing)", step_s)


def _faster_device(pricer: Pricer, best: Candidate, seeds: Sequence[Layout], limits: Limits) -> Relief | None:
    index = _busiest_device(best)
    devices = list(pricer.devices)
    devices[index] = _times(devices[index], 1 / _FASTER)
    found = _best_on(pricer, devices, best, seeds, limits, rounds=1)
    what = f"{pricer.devices[index].name} {_FASTER:g} times as fast"
    return None if found is None else Relief(what, _step_s(pricer, devices, found))


def _one_device_more(pricer: Pricer, best: Candidate, seeds: Sequence[Layout], limits: Limits) -> Relief | None:
    like = pricer.devices[_busiest_device(best)]
    more = like.model_copy(update={"agent_id": "one more device", "host_id": "one more host", "cores_id": ""})
    devices = [*pricer.devices, more]
    # A stage more than there were devices.
    allowed = replace(limits, max_stages=min(limits.max_stages + 1, pricer.table.num_blocks))
    found = _best_on(pricer, devices, best, seeds, allowed, rounds=1)
    return None if found is None else Relief(f"one device more like {like.name}", _step_s(pricer, devices, found))


def _best_on(
    pricer: Pricer,
    devices: Sequence[DeviceProfile],
    best: Candidate,
    seeds: Sequence[Layout],
    limits: Limits,
    *,
    rounds: int,
) -> Candidate | None:
    """The best that some steps of the search find on other devices; None if nothing beats the plan as it is."""
    other = Pricer(pricer.table, pricer.shape, devices, pricer.links)
    guesses = Guesses(other, limits)
    guesses.add(seeds)
    improve(other, guesses, limits, rounds=rounds)
    settled = settle(other, guesses.best(2))
    settled += [again] if (again := other.candidate(best.layout, best.cuts)) else []
    found = min(settled, key=lambda candidate: candidate.cost_s, default=None)
    if found is None:
        return None
    found = polish(other, found, rounds=3)
    return found if found.cost_s < best.cost_s * (1 - NOTABLE_SHARE / 2) else None


def _step_s(pricer: Pricer, devices: Sequence[DeviceProfile], found: Candidate) -> float:
    return Pricer(pricer.table, pricer.shape, devices, pricer.links).first_epoch(found).step_s


def _times(device: DeviceProfile, factor: float) -> DeviceProfile:
    return device.model_copy(update={"timings": device.timings.times(factor)})


def _busiest(best: Candidate) -> int:
    return max(range(len(best.layout)), key=lambda k: best.time.busy_s[k])


def _busiest_device(best: Candidate) -> int:
    """Of the busiest stage, the replica that computes longest."""
    k = _busiest(best)
    owners, costs = best.groups[k].owners, best.groups[k].replicas
    seconds = [max(1, owners.count(r)) * cost.compute_s for r, cost in enumerate(costs)]
    return best.layout[k][seconds.index(max(seconds))]


def _stage_names(pricer: Pricer, layout: Layout) -> list[str]:
    return [" + ".join(pricer.devices[i].name for i in group) for group in layout]
