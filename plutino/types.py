"""Identifiers and the few value types that every process shares."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Literal, NewType

JobId = NewType("JobId", str)
AgentId = NewType("AgentId", str)

SumDtype = Literal["fp32", "fp16"]
"""How gradients that several workers add up are held and travel."""

MicroBatchCut = Literal["rows", "tokens"]
"""What a step's micro-batches have alike; see :mod:`plutino.data.cutting`."""


class UnitKind(IntEnum):
    """What a pipeline is running: one optimiser step, one evaluation batch or one generation batch."""

    TRAIN = 1
    EVALUATE = 2
    GENERATE = 3


@dataclass(frozen=True, slots=True, order=True)
class Unit:
    """One piece of pipeline work that every stage of a job runs in the same order.

    ``serial`` is the step number for TRAIN. For the other kinds it is unique over the life of the job, coordinator
    restarts included, so that a frame of an abandoned evaluation can never be mistaken for one of its successor.
    """

    kind: UnitKind
    serial: int

    def __str__(self) -> str:
        return f"{self.kind.name.lower()} {self.serial}"


@dataclass(frozen=True, slots=True, order=True)
class WorkerRef:
    """Names one worker of a job: which stage it runs, and which replica of that stage it is."""

    job_id: JobId
    plan_epoch: int
    stage_index: int
    replica_index: int = 0

    def __str__(self) -> str:
        return f"{self.job_id}/epoch {self.plan_epoch}/stage {self.stage_index}.{self.replica_index}"
