"""The planner: numbers in, plan with its reasons out.

Entry points: :func:`search` for a given micro-batch, :func:`choose_micro_batch` where the job leaves it open.

Keeps the shape of PAC's planner (arXiv:2408.10746 sect. 5.1), stages and replica groups over blocks and devices, and
mends what it leaves out: links stand inside the recurrence, the bottleneck is the slowest stage or link and not the
last stage, the order of the devices is searched, shares follow speed, and memory depends on a stage's place in the 1F1B
pipeline. Good plans are found by :mod:`partitioner.climb`; where the layouts can be counted, :mod:`partitioner.exact`
proves the best one or finds it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from partitioner.border_codecs import least_lossy
from partitioner.climb import Guesses, Limits, improve, polish, settle, starts
from partitioner.device import DeviceProfile, LinkTable
from partitioner.exact import prove
from partitioner.fitting import fitting_layout
from partitioner.layout import Layout
from partitioner.model import ModelTable
from partitioner.orders import all_layouts
from partitioner.plan import Plan
from partitioner.pricing import Candidate, Pricer
from partitioner.question import Codec, Question, open_question
from partitioner.reasons import Outcome, make_plan
from partitioner.refusal import refuse
from partitioner.relief import reliefs
from partitioner.shape import JobShape
from partitioner.spread import MAX_POLISHED, Fan, SearchPart, climb_parts, in_turn, is_long

MAX_PROOF_WORK = 60_000
"""Cuts that the proof may look at, over all micro-batches and codecs."""
_NUM_IMPROVED = 2
"""Of the choices of micro-batch and codec so many, those with the best guesses, look for layouts."""
_NUM_DEEP = 3
"""So many have the cuts of their best layouts improved."""
_NUM_SETTLED = 6
_SETTLED_CUTS = 2_000
"""So many of the best guesses are cut exactly and replayed, and more as long as their stages times blocks are few."""
_NUM_POLISHED = 2
_FEW_CUTS = 200
"""Layouts of at most so many stages times blocks are all improved: it takes no time."""
_HOPE = 1.1
"""A candidate this much slower than the best is not worth improving; of few cuts one twice as slow is."""


@dataclass(frozen=True, slots=True, eq=False)
class _Variant:
    """One choice of micro-batch and codec."""

    shape: JobShape
    devices: tuple[DeviceProfile, ...]
    pricer: Pricer
    guesses: Guesses


def search(
    table: ModelTable,
    shape: JobShape,
    devices: Sequence[DeviceProfile],
    links: LinkTable | None = None,
    *,
    allow_replicas: bool = False,
    proof_work: int = MAX_PROOF_WORK,
    fan: Fan = in_turn,
) -> Plan:
    """The plan with the shortest predicted step among those that keep every device within its budget.

    Devices are left out where they would only slow the others. Checkpointing ``auto`` recomputes only on stages that
    do not fit without.

    Args:
        table: the model.
        shape: the job; its micro-batch is the one that the devices' timings are of.
        devices: devices that may be used.
        links: links between them; None: a LAN of 1 Gbit/s.
        allow_replicas: a stage may run on several devices, which share its micro-batches.
        proof_work: cuts that the proof may look at; 0 leaves it out.
        fan: runs the parts of a long search; it changes when the plan is there, and never the plan.

    Raises:
        InfeasiblePlanError: nothing fits; the message says what would.
    """
    question = Question(table, ((shape, tuple(devices)),), links or LinkTable(), allow_replicas)
    return answer(question, proof_work=proof_work, fan=fan)


def choose_micro_batch(
    table: ModelTable,
    shape: JobShape,
    devices: Sequence[DeviceProfile],
    links: LinkTable | None = None,
    *,
    label_tokens_of: Callable[[int], int] | None = None,
    codecs: Sequence[Codec] = (),
    allow_replicas: bool = False,
    proof_work: int = MAX_PROOF_WORK,
    fan: Fan = in_turn,
) -> Plan:
    """The fastest plan over all micro-batches that divide the batch, and over codecs.

    Args:
        table: the model.
        shape: the job; ``shape.micro_batch_rows`` is the size at which the devices were measured.
        devices: devices that may be used.
        links: links between them.
        label_tokens_of: rows -> largest number of label tokens in one micro-batch of so many rows; None: bounded.
        codecs: codecs to choose from, the lossless one first; empty: the shape's.
        allow_replicas: as for :func:`search`.
        proof_work: likewise.
        fan: likewise.

    Raises:
        InfeasiblePlanError: no micro-batch fits; the message is that of the one that needs the fewest bytes.
    """
    question = open_question(
        table,
        shape,
        devices,
        links,
        label_tokens_of=label_tokens_of,
        codecs=codecs,
        allow_replicas=allow_replicas,
    )
    return answer(question, proof_work=proof_work, fan=fan)


def answer(question: Question, *, proof_work: int = MAX_PROOF_WORK, fan: Fan = in_turn) -> Plan:
    """The best plan; see :func:`search`.

    Raises:
        InfeasiblePlanError: nothing fits.
    """
    table, links, limits = question.table, question.links, question.limits
    variants = [
        _Variant(shape, tuple(pricer.devices), pricer, Guesses(pricer, limits)) for shape, pricer in question.priced()
    ]
    outcome = _find(question, variants, limits, proof_work, fan)
    _, all_devices = question.inputs[-1]
    if outcome is None:
        refuse(table, question.lightest_shapes, all_devices, links)
    if question.is_codec_open:
        outcome.decide(*least_lossy(*outcome.chosen()))
    best, pricer = outcome.chosen()
    return make_plan(outcome, all_devices, reliefs(pricer, best, outcome.layouts(), limits))


def _find(
    question: Question, variants: Sequence[_Variant], limits: Limits, proof_work: int, fan: Fan
) -> Outcome | None:
    """The best candidate of all variants; None if nothing fits."""
    outcome = Outcome(variants[0].shape.codec if variants else "raw")
    if not variants:
        return None
    # Which pipelines are sensible hardly depends on the micro-batch: one choice gives the starts of all.
    middle = variants[len(variants) // 2]
    seeds = starts(middle.pricer, middle.guesses, limits)
    for variant in variants:
        variant.guesses.add(seeds)
    if is_long(question.table.num_blocks, len(middle.devices)):
        _find_spread(question, variants, seeds, outcome, fan)
    else:
        _find_here(variants, limits, outcome)
    if outcome.best is None:
        _settle_any(variants, outcome)
    _prove(variants, limits, outcome, proof_work)
    return outcome if outcome.best is not None else None


def _find_here(variants: Sequence[_Variant], limits: Limits, outcome: Outcome) -> None:
    """Climb one variant after the other, each from what the one before has found."""
    improved: list[_Variant] = []
    for _ in range(min(_NUM_IMPROVED, len(variants))):
        most_promising = min((v for v in variants if v not in improved), key=lambda v: _guess_s(v.guesses))
        improved.append(most_promising)
        improve(most_promising.pricer, most_promising.guesses, limits)
        # A good layout for one micro-batch and codec is seldom bad for another.
        for variant in variants:
            variant.guesses.add([layout for layout, _ in most_promising.guesses.best(_NUM_SETTLED)])
    ranked = sorted(variants, key=lambda v: _guess_s(v.guesses))
    for place, variant in enumerate(ranked):
        _settle_best(variant, outcome, is_promising=place < _NUM_DEEP)


def _find_spread(
    question: Question,
    variants: Sequence[_Variant],
    seeds: Sequence[Layout],
    outcome: Outcome,
    fan: Fan,
) -> None:
    """The same in parts that know nothing of each other: climbs from several numbers of stages, then cuts."""
    ranked = sorted(range(len(variants)), key=lambda i: (_guess_s(variants[i].guesses), i))
    climbs = [
        part
        for i in ranked[:_NUM_IMPROVED]
        for part in climb_parts(i, variants[i].guesses, seeds, allow_replicas=question.allow_replicas)
    ]
    found = [layout for result in fan(climbs, question.run_part) for layout in result.layouts]
    for variant in variants:
        variant.guesses.add(found)
    ranked.sort(key=lambda i: (_guess_s(variants[i].guesses), i))
    deep: list[tuple[int, Candidate]] = []
    for place, i in enumerate(ranked):
        is_promising = place < _NUM_DEEP
        settled = settle(variants[i].pricer, variants[i].guesses.best(_NUM_SETTLED if is_promising else 1))
        settled.sort(key=lambda candidate: candidate.cost_s)
        for candidate in settled or (None,):
            outcome.take(candidate, variants[i].pricer)
        deep += [(i, candidate) for candidate in settled[: _NUM_POLISHED if is_promising else 0]]
    deep = [(i, c) for i, c in deep if c.cost_s < outcome.limit_s(variants[i].pricer) * _HOPE]
    deep = sorted(deep, key=lambda item: item[1].cost_s)[:MAX_POLISHED]
    parts = [
        SearchPart(kind="polish", variant=i, layouts=(c.layout,), cuts=c.cuts, allow_replicas=question.allow_replicas)
        for i, c in deep
    ]
    for (i, candidate), result in zip(deep, fan(parts, question.run_part), strict=True):
        outcome.take(variants[i].pricer.candidate(candidate.layout, result.cuts), variants[i].pricer)


def _guess_s(guesses: Guesses) -> float:
    best = guesses.best(1)
    return best[0][1].step_s if best else math.inf


def _settle_best(variant: _Variant, outcome: Outcome, *, is_promising: bool) -> None:
    pricer = variant.pricer
    num_settled = max(_NUM_SETTLED, _SETTLED_CUTS // (len(pricer.devices) * pricer.table.num_blocks))
    settled = settle(pricer, variant.guesses.best(num_settled if is_promising else 1))
    settled.sort(key=lambda candidate: candidate.cost_s)
    for place, candidate in enumerate(settled):
        outcome.take(candidate, pricer)
        is_small = len(candidate.layout) * candidate.cuts[-1] <= _FEW_CUTS
        hope = 2 * _HOPE if is_small else _HOPE
        if (
            is_promising
            and (is_small or place < _NUM_POLISHED)
            and candidate.cost_s < outcome.limit_s(variant.pricer) * hope
        ):
            outcome.take(polish(variant.pricer, candidate), variant.pricer)
    if not settled:
        outcome.take(None, variant.pricer)


def _settle_any(variants: Sequence[_Variant], outcome: Outcome) -> None:
    """Whatever fits at all, for the smallest micro-batch first: guesses of memory are on the safe side."""
    for variant in sorted(variants, key=lambda v: v.shape.micro_batch_rows):
        layout = fitting_layout(variant.pricer.table, variant.shape, variant.devices, variant.pricer.links)
        cuts = None if layout is None else variant.pricer.clamped(layout, (0,) * (len(layout) + 1))
        candidate = None if layout is None or cuts is None else variant.pricer.candidate(layout, cuts)
        if candidate is not None:
            outcome.take(polish(variant.pricer, candidate), variant.pricer)


def _prove(variants: Sequence[_Variant], limits: Limits, outcome: Outcome, proof_work: int) -> None:
    """Find what was missed, or prove that there is nothing, where all layouts can be counted."""
    work_left = proof_work
    counted: dict[tuple[str, ...], list[Layout] | None] = {}
    bounds_s: list[float] = []
    for variant in sorted(variants, key=lambda v: outcome.cost_s(v.pricer)):
        # Twins at one micro-batch are twins at every other.
        key = tuple(device.agent_id for device in variant.devices)
        if key not in counted:
            counted[key] = all_layouts(
                variant.devices,
                variant.pricer.links,
                max_stages=limits.max_stages,
                exact_stages=limits.exact_stages,
                allow_replicas=limits.allow_replicas,
            )
        layouts = counted[key]
        if layouts is None or work_left <= 0:
            return
        proof = prove(variant.pricer, layouts, limit_s=outcome.limit_s(variant.pricer), allowance=work_left)
        work_left -= proof.work
        bounds_s.append(proof.bound_s)
        for candidate in proof.best_by_num_stages.values():
            outcome.take(candidate, variant.pricer)
    if outcome.best is not None:
        outcome.bound_s = min(*bounds_s, outcome.best.cost_s) if bounds_s else None
