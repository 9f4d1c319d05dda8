"""The planner's answer."""

from __future__ import annotations

from typing import Literal

from partitioner.values import PlanValue
from plutino.job.auto_method import AutoMethod
from plutino.job.model import PLAIN, Packing
from plutino.types import SumDtype


class MemoryItem(PlanValue):
    """One line of a device's memory bill."""

    name: str
    bytes: int
    why: str


_GRANTED_MORE_BYTES = 512 << 20
"""Beyond the prediction, what a worker may take where its device has them."""


class ReplicaPlan(PlanValue):
    """One worker of a stage."""

    agent_id: str
    device_name: str
    forward_s: float
    """One micro-batch, forward, embedding or head included."""
    backward_s: float
    memory: tuple[MemoryItem, ...]
    job_bytes: int
    baseline_bytes: int
    budget_bytes: int
    threads: int
    keeps_heap: bool = False

    @property
    def peak_bytes(self) -> int:
        """Predicted peak of the worker's resident memory."""
        return self.baseline_bytes + self.job_bytes

    @property
    def granted_bytes(self) -> int:
        """What the worker is held to, and what is reserved for it.

        A prediction that is wrong by much still holds, and the rest is there for the workers of other jobs.
        """
        job_bytes = max(2 * self.job_bytes, self.job_bytes + _GRANTED_MORE_BYTES)
        return min(self.budget_bytes, self.baseline_bytes + job_bytes)


class StagePlan(PlanValue):
    """One stage on its devices. Seconds and bytes are those of replica 0; the others have their own."""

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
    checkpointing: bool = False
    """The stage's blocks are recomputed in the backward pass."""
    codec: str | None = None
    """Of the boundary behind it; None: the plan's, or there is none."""
    further_replicas: tuple[ReplicaPlan, ...] = ()
    """Replicas 1 and on."""

    @property
    def peak_bytes(self) -> int:
        """Predicted peak of the resident memory of replica 0."""
        return self.baseline_bytes + self.job_bytes

    @property
    def replicas(self) -> tuple[ReplicaPlan, ...]:
        """All workers of the stage, in the order of ``agent_ids``."""
        first = ReplicaPlan(
            agent_id=self.agent_ids[0],
            device_name=self.device_names[0],
            forward_s=self.forward_s,
            backward_s=self.backward_s,
            memory=self.memory,
            job_bytes=self.job_bytes,
            baseline_bytes=self.baseline_bytes,
            budget_bytes=self.budget_bytes,
            threads=self.threads,
            keeps_heap=self.keeps_heap,
        )
        return (first, *self.further_replicas)


class LinkUse(PlanValue):
    """What one link between two workers carries in a step."""

    from_device: str
    to_device: str
    carries: Literal["hidden states", "sums of gradients"] = "hidden states"
    """Between neighbouring stages the first, with their gradients on the way up; between replicas the second."""
    down_bytes: int
    """From the first device to the second: hidden states, or the running sum."""
    up_bytes: int
    """Back: the hidden states' gradients, or the total."""
    busy_s: float
    """Seconds that it carries messages, in the busier direction."""
    bandwidth_bytes_per_s: float = 0.0
    latency_s: float = 0.0
    how_known: str = ""
    """Whether the two before were measured, and how long ago, or assumed."""


class CachedStep(PlanValue):
    """One optimiser step from the cache."""

    step_s: float
    in_stages: bool = False
    """Each stage of the pipeline trains its own part of the side network; else each device trains the whole of it on
    its own micro-batches."""
    agent_ids: tuple[str, ...]
    """Devices that take part; where each trains the whole, in the order in which the sum of gradients comes to them."""
    owners: tuple[int, ...]
    """Place in ``agent_ids`` of the device that runs micro-batch m; empty in stages, whose shares stay as they are."""
    compute_s: float
    """Of the busiest device."""
    read_s: float
    """Of the same device."""
    reduce_s: float
    """Until all have the whole gradient."""


class UpperStep(PlanValue):
    """One optimiser step of later epochs, where what frozen blocks give comes from the activation cache."""

    place: int
    """The lowest block that runs."""
    step_s: float
    row_bytes: int
    """Of the longest row's entry, on the disks of the devices that hold the place."""
    keeps_source: bool = False
    """The place is in a decoder: the encoder's output is kept beside what the block gets."""


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
    """Some stage recomputes its blocks; see StagePlan.checkpointing."""
    dtype: str
    method_choice: AutoMethod | None = None
    """Of a job that left its method open: what decided."""
    dtype_why: str = ""
    """Why it is the one, where that needs a word."""
    packing: Packing = PLAIN
    """How the frozen weights are held."""
    packing_why: str = ""
    unpacked_share: float = 1.0
    """Share of the model's weights that stay in the compute dtype."""
    codec: str
    """Of every boundary whose stage does not name another."""
    sums: SumDtype = "fp32"
    """How gradients travel between those who add them up."""
    runs_ahead: bool = False
    """See :attr:`partitioner.shape.JobShape.runs_ahead`."""
    step_s: float
    """Predicted seconds of one optimiser step."""
    bound_s: float | None = None
    """No plan over these devices can have a shorter step; None where that was not worked out."""
    links: tuple[LinkUse, ...] = ()
    bubble_share: float
    """Predicted idle share of the slowest stage."""
    bottleneck: str
    relief: str
    """What would make it faster or smaller."""
    cached: CachedStep | None = None
    """How these devices train from the activation cache; None: later epochs are as the first."""
    upper: UpperStep | None = None
    """How later epochs run in this pipeline with their frozen blocks left out; None: all blocks run in every epoch."""
    from_cache: bool = False
    """This is how, without the backbone: in the pipeline's stages, or one stage with the whole side network on every
    replica."""
    rejected: tuple[RejectedPlan, ...] = ()
    unused_devices: tuple[RejectedPlan, ...] = ()
    remarks: tuple[RejectedPlan, ...] = ()
    """What is to be known of the plan's devices."""

    def mean_step_s(self, cached_steps_share: float) -> float:
        """Mean seconds of all steps, where so many come from the cache for each one through the blocks."""
        if self.from_cache or (later_s := self.later_step_s) is None:
            return self.step_s
        return (self.step_s + cached_steps_share * later_s) / (1 + cached_steps_share)

    @property
    def later_step_s(self) -> float | None:
        """Of a step behind the first epoch, which comes from the activation cache; None: it is like the others."""
        later = self.cached or self.upper
        return None if later is None else later.step_s

    @property
    def bf16_borders(self) -> tuple[int, ...]:
        """Block borders at which a boundary of this plan carries bf16."""
        return tuple(stage.end_block for stage in self.stages[:-1] if (stage.codec or self.codec) == "bf16")

    @property
    def codec_in_words(self) -> str:
        """Of all boundaries."""
        if self.codec != "raw" or not self.bf16_borders:
            return self.codec
        number = len(self.bf16_borders)
        return f"bf16 at {number} of {len(self.stages) - 1} boundaries"

    @property
    def has_replicas(self) -> bool:
        """Whether some stage runs on several devices."""
        return any(stage.further_replicas for stage in self.stages)

    @property
    def agent_ids(self) -> tuple[str, ...]:
        """Agents of all stages, first stage first."""
        return tuple(agent for stage in self.stages for agent in stage.agent_ids)
