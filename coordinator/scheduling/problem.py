"""A round of scheduling as a value that can cross a process border: who waits, who offers, what is taken.

:func:`solve` is what the Scheduler actor runs. It is a pure function from JSON to JSON around
:func:`coordinator.scheduling.scheduler.decide` with the real planner.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from coordinator.scheduling.scheduler import (
    Decision,
    Offer,
    Park,
    QueuedJob,
    Refuse,
    Reservation,
    Reserve,
    Wait,
    decide,
)
from partitioner.device import DeviceProfile, LinkTable
from partitioner.model import JobShape, ModelTable
from partitioner.packed import WeightSizes
from partitioner.plan import Plan, RejectedPlan
from partitioner.search import choose_micro_batch, search
from partitioner.values import PlanValue
from plutino.errors import InfeasiblePlanError
from plutino.families import FAMILIES
from plutino.job.assignment import StageShape
from plutino.job.spec import JobSpec
from plutino.types import AgentId, JobId

REPLICAS_SHARE = 0.05
"""Replicas must save this share of the step to be used."""


class PlanningProblem(PlanValue):
    """All that decides a job's plan, but for the memory that other jobs hold."""

    job_id: str
    table: ModelTable
    shape: JobShape
    """Its micro_batch_rows is the size that the devices were measured with."""
    is_micro_batch_free: bool
    """The planner may choose another size; neither the job nor its numerics record fixes it."""
    label_tokens_per_row: int
    """Most label tokens in one row."""
    devices: tuple[DeviceProfile, ...]
    links: LinkTable
    packing_why: str = ""
    """Why the shape's packing is the one."""
    left_out: tuple[RejectedPlan, ...] = ()
    """Devices that may not take part, with the reason."""
    is_started: bool = False
    codecs: tuple[Literal["raw", "bf16"], ...] = ()
    """Codecs that the planner may choose from, the lossless one first; empty: the shape's."""
    num_train_rows: int = 0
    """Rows of an epoch."""
    known_plan: Plan | None = None
    """A plan for this very problem; taken where its devices still have the memory, so that nothing is searched."""
    allow_replicas: bool = False
    """A stage may run on several devices, if that saves REPLICAS_SHARE of the step."""

    def plan(self, devices: tuple[DeviceProfile, ...] | None = None) -> Plan:
        """The best plan over some of the devices, or all.

        Raises:
            InfeasiblePlanError: none fits.
        """
        usable = self.devices if devices is None else devices
        if self.known_plan is not None and _holds(self.known_plan, usable):
            return self.known_plan
        plan = self._search(usable)
        return plan.model_copy(
            update={
                "unused_devices": (*plan.unused_devices, *self.left_out),
                "packing": self.shape.packing,
                "packing_why": self.packing_why,
                "unpacked_share": WeightSizes(self.table, self.shape).unpacked_share,
            }
        )

    def plan_or_refusal(self) -> Plan | str:
        """The best plan over all devices, or why there is none."""
        try:
            return self.plan()
        except InfeasiblePlanError as error:
            return str(error)

    def _search(self, devices: tuple[DeviceProfile, ...]) -> Plan:
        plan = self._search_once(devices, allow_replicas=self.allow_replicas)
        if not plan.has_replicas:
            return plan
        try:
            alone = self._search_once(devices, allow_replicas=False)
        except InfeasiblePlanError:
            return plan
        return preferred(plan, alone)

    def _search_once(self, devices: tuple[DeviceProfile, ...], *, allow_replicas: bool) -> Plan:
        if not self.is_micro_batch_free:
            return search(self.table, self.shape, devices, self.links, allow_replicas=allow_replicas)
        return choose_micro_batch(
            self.table,
            self.shape,
            devices,
            self.links,
            label_tokens_of=lambda rows: rows * self.label_tokens_per_row,
            codecs=self.codecs,
            allow_replicas=allow_replicas,
        )


def _holds(plan: Plan, devices: Sequence[DeviceProfile]) -> bool:
    free_bytes = {device.agent_id: device.available_bytes for device in devices}
    for stage in plan.stages:
        for replica in stage.replicas:
            free_bytes[replica.agent_id] = free_bytes.get(replica.agent_id, 0) - replica.peak_bytes
    return min(free_bytes.values(), default=-1) >= 0


def preferred(shared: Plan, alone: Plan) -> Plan:
    """Of the best plan with replicas and the best one without: the first only where it is notably faster.

    Every replica is a device more that can be lost, and sends gradients where a stage of its own would send none.
    """
    saved = 1 - shared.step_s / alone.step_s
    if saved >= REPLICAS_SHARE:
        lost = RejectedPlan(what="without replicas", why=f"step {alone.step_s:.3g} s instead of {shared.step_s:.3g} s")
        return shared.model_copy(update={"rejected": (*shared.rejected, lost)})
    lost = RejectedPlan(
        what="with replicas",
        why=f"step {shared.step_s:.3g} s, {max(saved, 0.0):.0%} shorter; they must save {REPLICAS_SHARE:.0%}",
    )
    return alone.model_copy(update={"rejected": (*alone.rejected, lost)})


class HeldMemory(PlanValue):
    """A reservation."""

    job_id: str
    agent_id: str
    bytes: int


class SchedulingRound(PlanValue):
    """The whole question."""

    queue: tuple[PlanningProblem, ...]
    held: tuple[HeldMemory, ...]
    budgets_bytes: dict[str, int]
    """Budget of every device that is in."""


class Verdict(PlanValue):
    """The answer for one job."""

    job_id: str
    kind: Literal["reserve", "wait", "park", "refuse"]
    reason: str = ""
    plan: Plan | None = None
    held: tuple[HeldMemory, ...] = ()


class SchedulingAnswer(PlanValue):
    """The whole answer, in the queue's order."""

    verdicts: tuple[Verdict, ...]


def solve(round_json: str) -> str:
    """Decide a round; JSON of :class:`SchedulingRound` in, of :class:`SchedulingAnswer` out."""
    question = SchedulingRound.model_validate_json(round_json)
    problems = {JobId(problem.job_id): problem for problem in question.queue}
    decisions = decide(
        [QueuedJob(job_id=job_id, profiles=p.devices, is_started=p.is_started) for job_id, p in problems.items()],
        [Reservation(job_id=JobId(h.job_id), agent_id=AgentId(h.agent_id), bytes=h.bytes) for h in question.held],
        [Offer(agent_id=AgentId(agent), budget_bytes=budget) for agent, budget in question.budgets_bytes.items()],
        lambda job_id, profiles: problems[job_id].plan(profiles),
    )
    return SchedulingAnswer(verdicts=tuple(_verdict(decision) for decision in decisions)).model_dump_json()


def stage_shapes(plan: Plan) -> tuple[StageShape, ...]:
    """A plan's stages as its workers know them."""
    return tuple(
        StageShape(
            start_block=stage.start_block,
            end_block=stage.end_block,
            num_replicas=len(stage.agent_ids),
            micro_batch_owner=owners if len(stage.agent_ids) > 1 else (),
        )
        for stage, owners in zip(plan.stages, plan.micro_batch_owners, strict=True)
    )


def first_trainable_stage(spec: JobSpec, stages: Sequence[StageShape]) -> int:
    """The lowest stage that holds anything to train: the stages below it only run forward."""
    embeddings = {family.embedding[0].split(".")[-2] for family in FAMILIES.values()}
    lowest = spec.method.lowest_trained_block(embeddings)
    if lowest is None:
        return len(stages) - 1
    return next((i for i, stage in enumerate(stages) if lowest < stage.end_block), len(stages) - 1)


def _verdict(decision: Decision) -> Verdict:
    match decision:
        case Reserve(job_id=job_id, plan=plan, reservations=rows):
            held = tuple(HeldMemory(job_id=row.job_id, agent_id=row.agent_id, bytes=row.bytes) for row in rows)
            return Verdict(job_id=job_id, kind="reserve", plan=plan, held=held)
        case Wait(job_id=job_id, reason=reason):
            return Verdict(job_id=job_id, kind="wait", reason=reason)
        case Park(job_id=job_id, reason=reason):
            return Verdict(job_id=job_id, kind="park", reason=reason)
        case Refuse(job_id=job_id, reason=reason):
            return Verdict(job_id=job_id, kind="refuse", reason=reason)
