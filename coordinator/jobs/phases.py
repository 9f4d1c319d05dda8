"""The two phases of a job with an activation cache: the pipeline, which fills it, and epochs from the cache.

In the first phase the job's devices are a pipeline. Its later epochs take the quicker of two ways. In stages, every
entry stays where it was made, and every stage trains its own part of the side network; the job may go on so with its
backbone in memory. Data-parallel, every entry goes to the device that owns its place of a step, and each of the devices
trains the whole side network on its places. Once a whole epoch has run, and where it is worth it, the job moves: the
backbone leaves the devices' memory. Whatever needs the backbone (an evaluation, the verification of the adapter) moves
it back to the pipeline, and so does a lost device or a lost entry.

The decisions are pure functions of the plan and of what workers have told. What :class:`Phases` remembers lives in this
process alone: after a restart of the coordinator a job that is in the pipeline runs an epoch there before it moves.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from coordinator.jobs.replanning import as_running
from coordinator.scheduling.problem import PlanningProblem
from partitioner.cached_epoch import side_device, side_stage_bytes, side_worker_bytes
from partitioner.plan import CachedStep, MemoryItem, Plan, ReplicaPlan, StagePlan
from partitioner.pricing import Pricer
from plutino.data.batches import steps_per_epoch
from plutino.job.spec import JobSpec
from plutino.state_codecs import StateCodec, token_bytes

logger = logging.getLogger(__name__)

WORTH_FACTOR = 10.0
"""Epochs from the cache must last so many times as long as moving there and back."""

LEAST_MOVE_S = 0.3
"""No move takes less: measured with four blocks of 128 numbers whose processes went on. A job that this rules out hands
no entries over."""


def with_cached_step(plan: Plan, problem: PlanningProblem, spec: JobSpec, *, total_steps: int) -> Plan:
    """A pipeline's plan with how its devices will train from the cache; without, where later epochs are as the first.

    Data-parallel epochs need the job to leave its pipeline; where they would not last long enough, it trains from the
    cache in its stages.
    """
    num_cached_steps = total_steps - steps_per_epoch(problem.num_train_rows, spec.training.batch_size)
    if plan.from_cache:
        return plan
    if spec.training.activation_cache == "off" or not spec.method.leaves_blocks_alone or num_cached_steps <= 0:
        return plan.model_copy(update={"cached": None})
    running = as_running(problem, plan)
    ways = running.shape.cached_ways
    if len(set(plan.agent_ids)) < len(plan.agent_ids):
        ways = tuple(way for way in ways if way == "stages")
    step = _cached_step(plan, running, ways)
    if step is not None and not step.in_stages and not _is_worth(num_cached_steps, step, spec, move_s=LEAST_MOVE_S):
        step = _cached_step(plan, running, tuple(way for way in ways if way == "stages"))
    return plan.model_copy(update={"cached": step})


def _cached_step(plan: Plan, running: PlanningProblem, ways: tuple[str, ...]) -> CachedStep | None:
    """The quickest of these ways over the devices of a plan."""
    devices = [device for device in running.devices if device.agent_id in plan.agent_ids]
    position = {device.agent_id: i for i, device in enumerate(devices)}
    shape = running.shape.model_copy(update={"cached_ways": ways})
    layout = tuple(tuple(position[agent_id] for agent_id in stage.agent_ids) for stage in plan.stages)
    cuts = (0, *(stage.end_block for stage in plan.stages))
    return Pricer(running.table, shape, devices, running.links).cached_step(layout, cuts)


def _is_worth(num_steps: int, step: CachedStep, spec: JobSpec, *, move_s: float) -> bool:
    """Whether so many steps last long enough for the backbone to leave the devices' memory and to come back."""
    is_asked_for = spec.placement.cached_epochs in ("data-parallel", "stages")
    return num_steps > 0 and (is_asked_for or num_steps * step.step_s >= WORTH_FACTOR * 2 * move_s)


def plan_from_cache(plan: Plan, problem: PlanningProblem, spec: JobSpec) -> Plan:
    """The plan of the second phase, over the devices of a pipeline's plan."""
    step, codec = plan.cached, spec.training.activation_cache
    assert step is not None and codec != "off", "the pipeline's plan says how"
    running = as_running(problem, plan)
    without = {
        "checkpointing": False,
        "from_cache": True,
        "step_s": step.step_s,
        "bound_s": None,
        "links": (),
        "bubble_share": 0.0,
        "rejected": (),
    }
    if step.in_stages:
        return plan.model_copy(
            update=without
            | {
                "stages": tuple(_without_blocks(plan, stage, running) for stage in plan.stages),
                "bottleneck": "the side network, of which every stage trains its own part",
                "relief": "a larger method.reduction",
            }
        )
    return plan.model_copy(
        update=without
        | {
            "stages": (_whole_side_network(plan, step, running, codec),),
            "micro_batch_owners": (step.owners,),
            "bottleneck": "the side network, which every device trains on its own micro-batches",
            "relief": "another device, or a larger method.reduction",
        }
    )


def _without_blocks(plan: Plan, stage: StagePlan, running: PlanningProblem) -> StagePlan:
    """A stage with what stands beside and above its blocks."""
    num_stages = len(plan.stages)
    job_bytes = side_stage_bytes(
        running.table, running.shape, stage.start_block, stage.end_block, num_stages, stage.stage_index
    )
    words = "its part, with the head," if stage.end_block == running.table.num_blocks else "its part"
    changes: dict[str, object] = {
        "memory": (MemoryItem(name="side network", bytes=job_bytes, why=f"{words} and no block of the model"),),
        "job_bytes": job_bytes,
    }
    further = tuple(replica.model_copy(update=changes) for replica in stage.further_replicas)
    return stage.model_copy(update=changes | {"checkpointing": False, "further_replicas": further})


def _whole_side_network(plan: Plan, step: CachedStep, running: PlanningProblem, codec: StateCodec) -> StagePlan:
    """One stage of all devices that train data-parallel."""
    table, shape = running.table, running.shape
    entry_bytes = token_bytes(codec, table.hidden_size, shape.dtype_bytes)
    devices = {device.agent_id: device for device in running.devices}
    present = {replica.agent_id: replica for stage in plan.stages for replica in stage.replicas}
    job_bytes = side_worker_bytes(table, shape)
    items = (
        MemoryItem(name="side network", bytes=job_bytes, why="all of it with the head, and no block of the model"),
    )
    replicas = []
    for agent_id in step.agent_ids:
        compute_s = side_device(table, shape, devices[agent_id], entry_bytes, 1.0).compute_s
        replicas.append(
            present[agent_id].model_copy(
                update={
                    "forward_s": compute_s / 3,
                    "backward_s": compute_s * 2 / 3,
                    "memory": items,
                    "job_bytes": job_bytes,
                }
            )
        )
    return _stage(replicas, table.num_blocks)


def _stage(replicas: list[ReplicaPlan], num_blocks: int) -> StagePlan:
    first = replicas[0].model_dump(exclude={"agent_id", "device_name"})
    return StagePlan(
        stage_index=0,
        start_block=0,
        end_block=num_blocks,
        agent_ids=tuple(replica.agent_id for replica in replicas),
        device_names=tuple(replica.device_name for replica in replicas),
        further_replicas=tuple(replicas[1:]),
        **first,
    )


def entry_owners(plan: Plan) -> tuple[tuple[int, int], ...]:
    """Stage and replica of the worker that keeps all entries of a step's micro-batch m; empty: whoever makes them."""
    if plan.cached is None or plan.cached.in_stages or plan.from_cache:
        return ()
    worker_of = {agent: (s.stage_index, r) for s in plan.stages for r, agent in enumerate(s.agent_ids)}
    return tuple(worker_of[plan.cached.agent_ids[owner]] for owner in plan.cached.owners)


def has_run_an_epoch(next_step: int, start_step: int, epoch_steps: int) -> bool:
    """Whether the plan that began at ``start_step`` has run the whole epoch that ends before ``next_step``."""
    return next_step % epoch_steps == 0 and start_step <= next_step - epoch_steps


class Phases:
    """Which phase one job is in, and which it should be in.

    Args:
        spec: the job.
    """

    def __init__(self, spec: JobSpec) -> None:
        self._spec = spec
        self._problem: PlanningProblem | None = None
        self._pipeline: Plan | None = None
        self._are_entries_placed = False
        self._next: Plan | None = None

    def begin_plan(self, problem: PlanningProblem, plan: Plan) -> None:
        """A plan was stored; its workers come next."""
        if not plan.from_cache and plan != self._pipeline:
            self._problem, self._pipeline, self._are_entries_placed = problem, plan, False

    def forget(self) -> None:
        """A worker was lost: where entries are is not known any more."""
        self._problem = self._pipeline = self._next = None
        self._are_entries_placed = False

    def take_problem(self) -> PlanningProblem | None:
        """What a job that changes its phase is planned from; None if it does not."""
        plan, self._next = self._next, None
        if plan is None or self._problem is None or self._pipeline is None:
            return None
        # Not as it was first posed: what the pipeline chose stays where its devices no longer hold the plan.
        return as_running(self._problem, self._pipeline).model_copy(update={"known_plan": plan})

    def note(self, next_step: int, start_step: int, num_rows: int, left_out_rows: Iterable[int]) -> None:
        """A step of the pipeline was committed; learn whether all entries are where they are needed."""
        epoch_steps = steps_per_epoch(num_rows, self._spec.training.batch_size)
        if has_run_an_epoch(next_step, start_step, epoch_steps) and not any(left_out_rows):
            self._are_entries_placed = True

    def may_change_before(self, step: int, start_step: int, num_rows: int) -> bool:
        """Whether a pipeline may end before a step that is still to come."""
        plan = self._pipeline
        if plan is None or plan.cached is None or not self._may_leave or self._are_entries_placed:
            return False
        return has_run_an_epoch(step, start_step, steps_per_epoch(num_rows, self._spec.training.batch_size))

    def leave_pipeline(self, num_steps: int, *, move_s: float) -> str | None:
        """Why the job should now train from the cache for so many steps; None if it should not."""
        plan, problem = self._pipeline, self._problem
        if plan is None or problem is None or plan.cached is None or not self._are_entries_placed:
            return None
        if not self._may_leave or not _is_worth(num_steps, plan.cached, self._spec, move_s=move_s):
            return None
        self._next = plan_from_cache(plan, problem, self._spec)
        devices = ", ".join(name for stage in self._next.stages for name in stage.device_names)
        share = "its own blocks" if plan.cached.in_stages else "their own rows"
        return (
            f"what the blocks give of every row is in the activation cache: {devices} train the side network on "
            f"{share} for {num_steps} steps, and the backbone leaves their memory"
        )

    @property
    def _may_leave(self) -> bool:
        return self._spec.placement.cached_epochs != "pipeline"

    def return_to_pipeline(self) -> str:
        """Why a job without its backbone needs it again; the plan is the pipeline's before, where that is known."""
        self._next = self._pipeline
        return "what comes next runs through the blocks, which are loaded again"
