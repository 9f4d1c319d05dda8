"""What decides a job's plan, as a value that can cross a process border."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from partitioner.device import DeviceProfile, LinkTable
from partitioner.model import ModelTable
from partitioner.packed import WeightSizes
from partitioner.plan import Plan, RejectedPlan
from partitioner.question import Question, open_question
from partitioner.search import answer
from partitioner.shape import JobShape
from partitioner.spread import Fan, PartResult, SearchPart, in_turn
from partitioner.values import PlanValue
from plutino.errors import InfeasiblePlanError
from plutino.families import EMBEDDING_NAMES
from plutino.job.assignment import StageShape
from plutino.job.auto_method import AutoMethod
from plutino.job.spec import JobSpec

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
    dtype_why: str = ""
    """Why the shape's dtype is the one, where that needs a word."""
    left_out: tuple[RejectedPlan, ...] = ()
    """Devices that may not take part, with the reason."""
    num_unmeasured: int = 0
    """Of these, devices that may take part but could not be measured, beside jobs that fill them for instance."""
    is_started: bool = False
    codecs: tuple[Literal["raw", "bf16"], ...] = ()
    """Codecs that the planner may choose from, the lossless one first; empty: the shape's."""
    method_choice: AutoMethod | None = None
    """Of a job that left its method open: what decided."""
    num_train_rows: int = 0
    """Rows of an epoch."""
    known_plan: Plan | None = None
    """A plan for this very problem; taken where its devices still have the memory, so that nothing is searched."""
    allow_replicas: bool = False
    """A stage may run on several devices, if that saves REPLICAS_SHARE of the step."""

    def plan(self, fan: Fan = in_turn) -> Plan:
        """The best plan over the devices.

        Args:
            fan: runs the parts of a long search; it has no influence on the plan.

        Raises:
            InfeasiblePlanError: none fits.
        """
        if self.known_plan is not None and _holds(self.known_plan, self.devices):
            return self.known_plan
        plan = self._search(fan)
        return plan.model_copy(
            update={
                "unused_devices": (*plan.unused_devices, *self.left_out),
                "remarks": tuple(
                    RejectedPlan(what=device.name, why=device.remark)
                    for device in self.devices
                    if device.remark and device.agent_id in plan.agent_ids
                ),
                "packing": self.shape.packing,
                "packing_why": self.packing_why,
                "dtype_why": self.dtype_why,
                "method_choice": self.method_choice,
                "unpacked_share": WeightSizes(self.table, self.shape).unpacked_share,
            }
        )

    def plan_or_refusal(self) -> Plan | str:
        """The best plan over all devices, or why there is none."""
        try:
            return self.plan()
        except InfeasiblePlanError as error:
            return str(error)

    def run_part(self, part: SearchPart) -> PartResult:
        """One part of the search, wherever this runs."""
        return self._question(allow_replicas=part.allow_replicas).run_part(part)

    def _search(self, fan: Fan) -> Plan:
        try:
            plan = answer(self._question(allow_replicas=self.allow_replicas), fan=fan)
        except InfeasiblePlanError:
            if not self.shape.runs_ahead:
                raise
            # Waiting for messages is better than not fitting.
            waiting = self.shape.model_copy(update={"runs_ahead": False})
            return self.model_copy(update={"shape": waiting})._search(fan)
        if not plan.has_replicas:
            return plan
        try:
            alone = answer(self._question(allow_replicas=False), fan=fan)
        except InfeasiblePlanError:
            return plan
        return preferred(plan, alone, self.shape.cached_steps_share)

    def _question(self, *, allow_replicas: bool) -> Question:
        if not self.is_micro_batch_free:
            return Question(self.table, ((self.shape, self.devices),), self.links, allow_replicas)
        return open_question(
            self.table,
            self.shape,
            self.devices,
            self.links,
            label_tokens_of=lambda rows: rows * self.label_tokens_per_row,
            codecs=self.codecs,
            allow_replicas=allow_replicas,
        )


def _holds(plan: Plan, devices: Sequence[DeviceProfile]) -> bool:
    free_bytes = {device.agent_id: device.available_bytes for device in devices}
    for stage in plan.stages:
        for replica in stage.replicas:
            free_bytes[replica.agent_id] = free_bytes.get(replica.agent_id, 0) - replica.granted_bytes
    return min(free_bytes.values(), default=-1) >= 0


def preferred(shared: Plan, alone: Plan, cached_steps_share: float = 0.0) -> Plan:
    """Of the best plan with replicas and the best one without: the first only where it is notably faster.

    Every replica is a device more that can be lost, and sends gradients where a stage of its own would send none. But
    where each has the whole model, and a pipeline stands against them, a lost one leaves the others everything, and no
    stage waits for the one before it: there the quicker plan is taken.
    """
    shared_s, alone_s = (plan.mean_step_s(cached_steps_share) for plan in (shared, alone))
    saved = 1 - shared_s / alone_s
    needed = 0.0 if len(shared.stages) == 1 < len(alone.stages) else REPLICAS_SHARE
    if saved >= needed:
        lost = RejectedPlan(what="without replicas", why=f"step {alone_s:.3g} s instead of {shared_s:.3g} s")
        return shared.model_copy(update={"rejected": (*shared.rejected, lost)})
    lost = RejectedPlan(
        what="with replicas",
        why=f"step {shared_s:.3g} s instead of {alone_s:.3g} s"
        if saved < 0
        else f"step {shared_s:.3g} s, {saved:.0%} shorter; they must save {needed:.0%}",
    )
    return alone.model_copy(update={"rejected": (*alone.rejected, lost)})


def stage_shapes(plan: Plan) -> tuple[StageShape, ...]:
    """A plan's stages as its workers know them."""
    return tuple(
        StageShape(
            start_block=stage.start_block,
            end_block=stage.end_block,
            num_replicas=len(stage.agent_ids),
            micro_batch_owner=owners if len(stage.agent_ids) > 1 else (),
            ahead=len(plan.stages) - 1 - stage.stage_index if plan.runs_ahead else 0,
        )
        for stage, owners in zip(plan.stages, plan.micro_batch_owners, strict=True)
    )


def first_trainable_stage(spec: JobSpec, stages: Sequence[StageShape]) -> int:
    """The lowest stage that holds anything to train: the stages below it only run forward."""
    lowest = spec.method.lowest_trained_block(stages[-1].end_block, EMBEDDING_NAMES)
    if lowest is None:
        return len(stages) - 1
    return next((i for i, stage in enumerate(stages) if lowest < stage.end_block), len(stages) - 1)
