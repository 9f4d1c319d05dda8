"""The workers of one device as its pool knows them, and the memory that they have been promised."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edge_node.guard import read_usage
from edge_node.supervision import Exiting, refusal
from edge_node.worker_process import WorkerProcess
from plutino.errors import AgentError, ConfigError
from plutino.types import WorkerRef


@dataclass(frozen=True, slots=True)
class AskedProfile:
    """A measurement that a worker was asked for."""

    request_id: str
    request: dict[str, Any]
    is_undisturbed: bool
    """No worker of this device computed for a job when it was asked."""


@dataclass(eq=False, slots=True, kw_only=True)
class PooledWorker:
    """One worker process."""

    process: WorkerProcess
    log_path: Path
    ref: WorkerRef | None = None
    """Whom it works for; None while it is a spare."""
    budget_bytes: int = 0
    held_key: str = ""
    """Key of the stage that it holds while it waits for the next job of that key, or of its job (:func:`job_key`)."""
    held_until_s: float = 0.0
    left_bytes: int = 0
    """What it holds of a stage that it gave back."""
    profiles: deque[AskedProfile] = field(default_factory=deque)
    """Requests it has not answered, in the order it got them."""
    exiting: Exiting | None = None
    over_budget: str | None = None
    stop_reason: str | None = None
    end_reason: str | None = None

    @property
    def is_spare(self) -> bool:
        """It waits for a job, with nothing loaded."""
        return self.ref is None and not self.held_key and not self.is_ending

    @property
    def is_ending(self) -> bool:
        """It was told to end, will be killed for what it holds, or is gone and the pool will hear of it."""
        return self.stop_reason is not None or self.over_budget is not None or read_usage(self.process.pid) is None


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What of an assignment is the agent's business."""

    budget_bytes: int
    stage_key: str
    headroom_bytes: int


def worker_of(ref: WorkerRef, workers: Collection[PooledWorker]) -> PooledWorker | None:
    """The one that works for ``ref``."""
    return next((worker for worker in workers if worker.ref == ref), None)


def spare_of(workers: Collection[PooledWorker]) -> PooledWorker | None:
    """The one that waits for a job, with nothing loaded."""
    return next((worker for worker in workers if worker.is_spare), None)


def job_key(job_id: str) -> str:
    """Under which a process waits for its part in a job's next plan."""
    return f"job {job_id}"


def holder_of(key: str, workers: Collection[PooledWorker]) -> PooledWorker | None:
    """The one that waits with that stage loaded, or for that job's next plan."""
    holders = (worker for worker in workers if worker.held_key == key and not worker.is_ending)
    return next(holders, None) if key else None


def process_for(asked: Asked, job_id: str, workers: Collection[PooledWorker]) -> PooledWorker | None:
    """The process that waits for such a worker: with its stage, or with what it trained if the budget has room."""
    if (holder := holder_of(asked.stage_key, workers)) is not None:
        return holder
    going_on = holder_of(job_key(job_id), workers)
    return going_on if going_on is not None and going_on.left_bytes <= asked.headroom_bytes else None


def promised_bytes(workers: Collection[PooledWorker]) -> list[int]:
    """The budgets of those that work for a job or hold a stage."""
    return [worker.budget_bytes for worker in workers if worker.ref is not None or worker.held_key]


def refuse_too_large(
    budget_bytes: int, holder: PooledWorker | None, workers: Collection[PooledWorker], memory_budget_bytes: int
) -> None:
    """Refuse a worker that has no room beside the others; ``holder`` would become it.

    Raises:
        AgentError: with the numbers.
    """
    promised = promised_bytes(workers)
    if holder is not None:
        promised.remove(holder.budget_bytes)
    reason = refusal(budget_bytes, promised, memory_budget_bytes)
    if reason is not None:
        raise AgentError(reason)


def read_assignment(assignment_json: str) -> Asked:
    """An assignment's memory and the key of its stage; all else is the worker's business.

    Raises:
        ConfigError: it is malformed.
    """
    try:
        assignment = json.loads(assignment_json)
        budget_bytes, headroom_bytes = assignment["memory_budget_bytes"], assignment.get("headroom_bytes", 0)
        stage_key = str(assignment.get("stage_key", ""))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"the assignment is malformed ({error!r}); use the same version on all sides") from error
    if not isinstance(budget_bytes, int) or not isinstance(headroom_bytes, int):
        raise ConfigError(f"the assignment's memory, {budget_bytes!r} and {headroom_bytes!r}, is no number of bytes")
    return Asked(budget_bytes=budget_bytes, stage_key=stage_key, headroom_bytes=headroom_bytes)
