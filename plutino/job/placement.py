"""Where the job may run."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from plutino.job.base import SpecPart
from plutino.types import SumDtype


class PlacementConfig(SpecPart):
    """Limits on the plan."""

    numerics: Literal["fixed", "free"] = "fixed"
    """fixed: a re-plan may never change the job's bits. free: the planner may choose codecs and micro-batches anew,
    and replicas add up their own micro-batches before they hand over gradients."""
    codec: Literal["raw", "bf16", "auto"] = "raw"
    """How hidden states travel between stages: as they are, or rounded to bf16 (half the bytes of fp32). auto: the
    first plan rounds them where that makes a step notably shorter. Under ``numerics: fixed`` they are rounded at the
    first plan's borders for the whole job, wherever its stages end later."""
    sums: SumDtype = "fp32"
    """How gradients travel that replicas, or holders of a tied embedding, add up. fp16: half the bytes; every sum is
    rounded after each addition to 11 bits with a scale of its own for each parameter, alike on any number of devices,
    so that the job's bits still do not depend on the plan. Moments and trained values stay fp32."""
    devices: tuple[str, ...] = ()
    """Names of the devices to use; empty means any."""
    stages: int | None = Field(None, ge=1)
    """Exactly so many stages; None lets the plan choose."""
    replicas: Literal["auto", "never"] = "auto"
    """auto: a stage may run on several devices, which share its micro-batches, where that makes a step notably
    shorter. never: every stage runs on one device."""
    replan: Literal["auto", "never"] = "auto"
    """auto: a running job moves to another plan where a device became slower or faster, or others joined, and the rest
    of the job gains more than moving costs. never: only a loss changes the plan."""
    cached_epochs: Literal["auto", "data-parallel", "stages", "pipeline"] = "auto"
    """Where training.activation_cache holds every row. data-parallel: the backbone leaves the devices' memory after the
    first epoch, and each of them trains on its own micro-batches. stages: it leaves, and every stage trains on what its
    own blocks gave. pipeline: likewise, but the backbone stays. auto: whichever is quicker; the backbone leaves where
    such epochs last notably longer than moving there and back."""
    threads: int | None = Field(None, ge=1)
    """Intra-op threads of every worker. None: each device's own number; where those differ, moving a block in a
    re-plan may change the last bit of fp32 products."""
    max_recoveries: int = Field(3, ge=0)
    """How often the job may go back to its newest durable step after losing a worker before it fails."""
