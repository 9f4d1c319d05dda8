"""From what a search found to a plan that says why it is the one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from partitioner.device import DeviceProfile
from partitioner.layout import Layout, replica_shares
from partitioner.link_uses import link_uses
from partitioner.place import ReplicaShare
from partitioner.plan import Plan, RejectedPlan, ReplicaPlan, StagePlan
from partitioner.pricing import Candidate, Pricer
from partitioner.relief import NOTABLE_SHARE, Relief, bottleneck, in_words
from plutino.dtypes import why_not_run
from plutino.sizes import format_size


@dataclass(slots=True)
class Outcome:
    """The best candidates of a search, by micro-batch and codec and by number of stages."""

    lossless: str
    """The codec that costs nothing; any other must save NOTABLE_SHARE of the step to be taken."""
    best: Candidate | None = None
    bound_s: float | None = None
    by_num_stages: dict[int, Candidate] = field(default_factory=dict)
    _pricer: Pricer | None = None
    _by_variant: dict[int, tuple[Pricer, Candidate | None]] = field(default_factory=dict)

    def take(self, candidate: Candidate | None, pricer: Pricer) -> None:
        """Note a candidate; None: nothing was found for the pricer's micro-batch and codec."""
        known = self._by_variant.get(id(pricer))
        if known is None or known[1] is None or (candidate is not None and candidate.cost_s < known[1].cost_s):
            self._by_variant[id(pricer)] = (pricer, candidate)
        if candidate is None:
            return
        num_stages = len(candidate.layout)
        if num_stages not in self.by_num_stages or candidate.cost_s < self.by_num_stages[num_stages].cost_s:
            self.by_num_stages[num_stages] = candidate
        if candidate.cost_s < self.limit_s(pricer):
            self.best, self._pricer = candidate, pricer

    def limit_s(self, pricer: Pricer) -> float:
        """What a candidate for a pricer's micro-batch and codec must beat to become the best."""
        if self.best is None or self._pricer is None:
            return math.inf
        return self.best.cost_s * self._price(self._pricer) / self._price(pricer)

    def _price(self, pricer: Pricer) -> float:
        return 1.0 if pricer.shape.codec == self.lossless else 1.0 / (1.0 - NOTABLE_SHARE)

    def cost_s(self, pricer: Pricer) -> float:
        """The least cost for a pricer's micro-batch and codec; infinite if none was found."""
        known = self._by_variant.get(id(pricer))
        return math.inf if known is None or known[1] is None else known[1].cost_s

    def decide(self, candidate: Candidate, pricer: Pricer) -> None:
        """Take a candidate whatever else was found."""
        self.best, self._pricer = candidate, pricer
        self.by_num_stages[len(candidate.layout)] = candidate

    def chosen(self) -> tuple[Candidate, Pricer]:
        """The best candidate and what priced it."""
        assert self.best is not None and self._pricer is not None, "only asked where something fits"
        return self.best, self._pricer

    def layouts(self) -> list[Layout]:
        """Layouts of the best candidates, the best first."""
        return list(dict.fromkeys(c.layout for c in sorted(self.by_num_stages.values(), key=lambda c: c.cost_s)))

    def variants(self) -> list[tuple[Pricer, Candidate | None]]:
        """The best candidate of every micro-batch and codec."""
        return list(self._by_variant.values())


def make_plan(outcome: Outcome, all_devices: Sequence[DeviceProfile], found: Sequence[Relief]) -> Plan:
    """The best candidate as a plan.

    Args:
        outcome: what the search found.
        all_devices: every device that was offered, those that the search could not use included.
        found: what would make the step shorter.
    """
    compared, pricer = outcome.chosen()
    shape, best = pricer.shape, pricer.first_epoch(compared)
    stages = tuple(_stage(pricer, best, k) for k in range(len(best.layout)))
    return Plan(
        stages=stages,
        micro_batch_rows=shape.micro_batch_rows,
        num_micro_batches=shape.num_micro_batches,
        micro_batch_owners=tuple(group.owners for group in best.groups),
        checkpointing=any(best.checkpointing),
        dtype=shape.dtype,
        codec=shape.codec,
        sums=shape.sums,
        runs_ahead=shape.runs_ahead,
        step_s=best.step_s,
        bound_s=outcome.bound_s if shape.cached_steps_share == 0 else None,
        cached=pricer.cached_step(best.layout, best.cuts) if shape.cached_steps_share else None,
        upper=pricer.upper_step(compared),
        links=link_uses(pricer, best),
        bubble_share=best.time.bubble_share,
        bottleneck=bottleneck(pricer, best),
        relief=in_words(found),
        rejected=_rejected(outcome),
        unused_devices=_unused(pricer, all_devices, stages, best),
    )


def _stage(pricer: Pricer, best: Candidate, k: int) -> StagePlan:
    start, end = best.cuts[k], best.cuts[k + 1]
    shares = replica_shares(best.layout, k, best.groups[k].owners, runs_ahead=pricer.shape.runs_ahead)
    workers = [_worker(pricer, best, k, r, share) for r, share in enumerate(shares)]
    first = workers[0]
    return StagePlan(
        stage_index=k,
        start_block=start,
        end_block=end,
        agent_ids=tuple(worker.agent_id for worker in workers),
        device_names=tuple(worker.device_name for worker in workers),
        checkpointing=best.checkpointing[k],
        codec="bf16" if end in pricer.shape.bf16_borders else None,
        further_replicas=tuple(workers[1:]),
        **first.model_dump(exclude={"agent_id", "device_name", "memory"}),
        memory=first.memory,
    )


def _worker(pricer: Pricer, best: Candidate, k: int, replica: int, share: ReplicaShare) -> ReplicaPlan:
    device, cost = pricer.devices[best.layout[k][replica]], best.groups[k].replicas[replica]
    keeps_heap = pricer.keeps_heap(
        best.layout, k, replica, best.cuts[k], best.cuts[k + 1], checkpointing=best.checkpointing[k]
    )
    items = pricer.memory.items(
        best.cuts[k],
        best.cuts[k + 1],
        num_stages=len(best.layout),
        stage_index=k,
        checkpointing=best.checkpointing[k],
        share=share,
        keeps_heap=keeps_heap,
    )
    return ReplicaPlan(
        agent_id=device.agent_id,
        device_name=device.name,
        forward_s=cost.forward_s,
        backward_s=cost.backward_s,
        memory=items,
        job_bytes=sum(item.bytes for item in items),
        baseline_bytes=device.baseline_bytes,
        budget_bytes=device.available_bytes,
        threads=device.threads,
        keeps_heap=keeps_heap,
    )


def _rejected(outcome: Outcome) -> tuple[RejectedPlan, ...]:
    best, pricer = outcome.chosen()
    all_steps = ", steps from the cache included" if pricer.shape.cached_steps_share else ""
    rejected = []
    for num_stages in range(1, min(len(pricer.devices), pricer.table.num_blocks) + 1):
        if num_stages == len(best.layout) or pricer.shape.exact_stages is not None:
            continue
        candidate = outcome.by_num_stages.get(num_stages)
        why = (
            f"{candidate.cost_s:.3g} s a step against {best.cost_s:.3g} s{all_steps}"
            if candidate is not None
            else f"does not fit, or is not faster than {best.cost_s:.3g} s a step{all_steps}"
        )
        rejected.append(RejectedPlan(what=count(num_stages, "stage"), why=why))
    if pricer.shape.checkpointing == "auto" and not any(best.checkpointing):
        rejected.append(
            RejectedPlan(what="checkpointing", why="every stage fits without, and recomputing takes longer")
        )
    elif pricer.shape.checkpointing == "auto":
        stages = ", ".join(str(k) for k, choice in enumerate(best.checkpointing) if choice)
        rejected.append(RejectedPlan(what="no checkpointing", why=f"stage {stages} would not fit with these blocks"))
    for other, candidate in outcome.variants():
        if other is pricer:
            continue
        what = f"micro-batches of {count(other.shape.micro_batch_rows, 'row')}"
        if other.shape.codec != pricer.shape.codec:
            what += f", codec {other.shape.codec}"
        why = "fit no budget" if candidate is None else f"{candidate.cost_s:.3g} s a step against {best.cost_s:.3g} s"
        rejected.append(RejectedPlan(what=what, why=why))
    if outcome.bound_s is None:
        rejected.append(
            RejectedPlan(what="other layouts", why="too many to try all: the search changed the best ones step by step")
        )
    elif outcome.bound_s < best.cost_s * (1 - 1e-6):
        rejected.append(
            RejectedPlan(
                what="some other cuts",
                why=f"not tried, the search's allowance was used up; none can take less than {outcome.bound_s:.3g} s",
            )
        )
    return tuple(rejected)


def _unused(
    pricer: Pricer, all_devices: Sequence[DeviceProfile], stages: Sequence[StagePlan], best: Candidate
) -> tuple[RejectedPlan, ...]:
    used = {agent_id for stage in stages for agent_id in stage.agent_ids}
    shape = pricer.shape
    smallest_bytes = _smallest_stage_bytes(pricer)
    unused = []
    for device in all_devices:
        if device.agent_id in used:
            continue
        if shape.dtype not in device.dtypes:
            why = why_not_run(shape.dtype, device.dtypes, dict(device.slow_dtypes))
        elif device.available_bytes - device.baseline_bytes < smallest_bytes:
            why = (
                f"offers {format_size(device.available_bytes)}; a worker of one block takes "
                f"{format_size(device.baseline_bytes + smallest_bytes)}"
            )
        elif shape.exact_stages is not None and shape.exact_stages == len(stages):
            why = f"the job asks for exactly {count(shape.exact_stages, 'stage')}"
        else:
            why = f"no plan with it was found that takes less than {best.step_s:.3g} s a step"
        unused.append(RejectedPlan(what=device.name, why=why))
    return tuple(unused)


def _smallest_stage_bytes(pricer: Pricer) -> int:
    """Job bytes of the lightest stage that a pipeline of any length has, with one micro-batch in flight."""
    memory, num_blocks = pricer.memory, pricer.table.num_blocks
    checkpointing = pricer.choices[-1]

    def job_bytes(start: int, num_stages: int, stage_index: int) -> int:
        one = ReplicaShare(in_flight=1, gradient_copies=0, num_peers=1)
        return memory.job_bytes(
            start, start + 1, num_stages=num_stages, stage_index=stage_index, checkpointing=checkpointing, share=one
        )

    middle = [job_bytes(block, 3, 1) for block in range(1, num_blocks - 1)]
    return min([job_bytes(0, 2, 0), job_bytes(num_blocks - 1, 2, 1), *middle])


def count(number: int, noun: str) -> str:
    """A number with its noun."""
    return f"{number} {noun}" + ("" if number == 1 else "s")
