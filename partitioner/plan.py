"""The planner's answer."""

from __future__ import annotations

from partitioner.values import PlanValue
from plutino.job.model import PLAIN, Packing


class MemoryItem(PlanValue):
    """One line of a device's memory bill."""

    name: str
    bytes: int
    why: str


class StagePlan(PlanValue):
    """One stage on its devices."""

    stage_index: int
    start_block: int
    end_block: int
    agent_ids: tuple[str, ...]
    """One per replica."""
    device_names: tuple[str, ...]
    forward_s: float
    """One micro-batch, forward, embedding or head included."""
    backward_s: float
    memory: tuple[MemoryItem, ...]
    """Itemised job bytes; the sum with the baseline is the predicted peak of the worker's resident memory."""
    job_bytes: int
    baseline_bytes: int
    budget_bytes: int
    threads: int
    keeps_heap: bool = False
    """malloc keeps freed blocks for the next step instead of giving them back: faster, where the budget has room."""

    @property
    def peak_bytes(self) -> int:
        """Predicted peak of the worker's resident memory."""
        return self.baseline_bytes + self.job_bytes


class RejectedPlan(PlanValue):
    """An alternative and why it lost."""

    what: str
    why: str


class Plan(PlanValue):
    """Stages on devices, with the prediction and its reasons."""

    stages: tuple[StagePlan, ...]
    micro_batch_rows: int
    num_micro_batches: int
    micro_batch_owners: tuple[tuple[int, ...], ...]
    """For every stage: the replica that runs micro-batch m."""
    checkpointing: bool
    dtype: str
    packing: Packing = PLAIN
    """How the frozen weights are held."""
    packing_why: str = ""
    unpacked_share: float = 1.0
    """Share of the model's weights that stay in the compute dtype."""
    codec: str
    step_s: float
    """Predicted seconds of one optimiser step."""
    bubble_share: float
    """Predicted idle share of the slowest stage."""
    bottleneck: str
    relief: str
    """What would make it faster or smaller."""
    rejected: tuple[RejectedPlan, ...] = ()
    unused_devices: tuple[RejectedPlan, ...] = ()

    @property
    def agent_ids(self) -> tuple[str, ...]:
        """Agents of all stages, first stage first."""
        return tuple(agent for stage in self.stages for agent in stage.agent_ids)
