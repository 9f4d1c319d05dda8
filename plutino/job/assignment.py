"""What one worker is told to do: the coordinator writes it, the agent hands it on, the worker reads it."""

from __future__ import annotations

import hashlib
import json

from pydantic import BaseModel, ConfigDict

from plutino.job.numerics import NumericsRecord
from plutino.job.spec import JobSpec
from plutino.types import JobId, WorkerRef


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class StageShape(_Part):
    """One stage of the plan, as every worker of the job must know it."""

    start_block: int
    end_block: int
    num_replicas: int = 1
    micro_batch_owner: tuple[int, ...] = ()
    """Replica that runs micro-batch m of a step; empty means replica 0 runs all. Longer steps wrap around."""
    ahead: int = 0
    """Forward passes by which the stage runs further ahead of its backward passes than workers lie from it to the end;
    never more on a later stage."""

    def replica_of(self, micro_batch: int) -> int:
        """The replica that runs a micro-batch."""
        owners = self.micro_batch_owner
        return owners[micro_batch % len(owners)] if owners else 0


class RestorePoint(_Part):
    """A durable step to start from."""

    step: int
    """Number of optimiser steps already applied."""
    shadows: dict[str, str]
    """Shadow id -> sha256 of its file; together they hold every global parameter with its moments."""
    sizes_bytes: dict[str, int] = {}
    """Shadow id -> bytes of its file."""
    is_left_on_devices: bool = False
    """The workers that trained it may have left their parts in their devices' caches."""


class StoredAdapter(_Part):
    """A published checkpoint that the bulk process hands out as a shadow of the job."""

    shadow_id: str
    sha256: str


class StoredRewardAdapter(_Part):
    """A reward adapter that scores what the job samples."""

    tensors: StoredAdapter
    config_json: str
    """Its adapter_config.json."""


class DeviceCache(_Part):
    """Where another device of the job hands out its weights cache."""

    agent_id: str
    device_name: str
    address: str


class WorkerAssignment(_Part):
    """Everything a worker needs before it hears its first command."""

    job_id: str
    plan_epoch: int
    stage_index: int
    replica_index: int = 0
    stages: tuple[StageShape, ...]
    spec: JobSpec
    numerics: NumericsRecord
    checkpointing: bool
    first_trainable_stage: int = 0
    """Stages below it hold nothing to train: they run forward only."""
    base_hash: str
    """Hash of what the base model computes, see plutino.manifest."""
    manifest_sha256: str
    """Hash of the base model's manifest, which the bulk process hands out; whatever is loaded is checked against it."""
    total_steps: int
    """Length of the learning-rate schedule, in optimiser steps."""
    max_micro_batches: int
    """Largest number of micro-batches in one step."""
    threads: int
    memory_budget_bytes: int
    """Bound on the worker's whole resident memory."""
    headroom_bytes: int = 0
    """How much of the budget is beyond the plan's prediction."""
    keeps_heap: bool = False
    """malloc keeps freed blocks on the heap."""
    coordinator_address: str
    bulk_address: str
    initial: StoredAdapter | None = None
    """What training starts from, or what only scores; None: fresh."""
    restore: RestorePoint | None = None
    stage_key: str = ""
    """What the loaded stage will be, see :func:`stage_key`."""
    keeps_stage_s: float = 0.0
    """After a good end the stage stays loaded for so many seconds, for the next job of the same stage key."""
    entry_owners: tuple[tuple[int, int], ...] = ()
    """Stage and replica of the worker that keeps what is computed of a step's micro-batch m, for epochs without the
    backbone; longer steps wrap around. Empty: everyone keeps its own."""
    from_cache: bool = False
    """The worker has no backbone: it trains on what the activation cache holds."""
    reward_adapter: StoredRewardAdapter | None = None
    caches: tuple[DeviceCache, ...] = ()
    """Of the other devices of the plan."""

    @property
    def ref(self) -> WorkerRef:
        """The worker's name."""
        return WorkerRef(JobId(self.job_id), self.plan_epoch, self.stage_index, self.replica_index)

    @property
    def shape(self) -> StageShape:
        """The worker's own stage."""
        return self.stages[self.stage_index]

    @property
    def is_first(self) -> bool:
        """Whether the stage reads tokens."""
        return self.stage_index == 0

    @property
    def is_last(self) -> bool:
        """Whether the stage computes the loss."""
        return self.stage_index == len(self.stages) - 1


def stage_key(
    base_hash: str, shape: StageShape, numerics: NumericsRecord, *, checkpointing: bool, has_lm_head: bool
) -> str:
    """Hash of all that decides what a worker has loaded before a method is attached: equal keys, equal bits."""
    values = {
        "base": base_hash,
        "blocks": [shape.start_block, shape.end_block],
        "dtype": numerics.dtype,
        "attention": numerics.attention,
        "packing": numerics.packing.model_dump(mode="json"),
        "versions": dict(numerics.versions),
        "checkpointing": checkpointing,
        "has_lm_head": has_lm_head,
    }
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
