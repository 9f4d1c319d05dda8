"""What the driver makes true for a job; every command does nothing where it is true already.

The commands follow from the record alone (:func:`standing_commands`), so a restarted coordinator repeats those of every
stored record and goes on.
"""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.jobs.record import JobRecord, JobState
from plutino.types import JobId


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """Something the driver makes true; it does nothing where it is true already."""

    job_id: JobId


@dataclass(frozen=True, slots=True, kw_only=True)
class StartRunner(Command):
    """A runner exists and has read the rows; in SUBMITTED, DataPrepared follows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StopRunner(Command):
    """No runner exists."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replan(Command):
    """The job stands in the scheduler's queue (Planned, Queued or Parked)."""

    plan_epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StartWorkers(Command):
    """All workers of the stored plan run, are loaded and linked (AllLoaded)."""

    plan_epoch: int
    restore_step: int
    """The durable step that a new worker starts from; 0 means fresh adapters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StopWorkers(Command):
    """No worker of a plan epoch below this one runs."""

    before_epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseReservation(Command):
    """No memory is reserved for the job; comes after StopWorkers, when the memory is really free."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BeginSteps(Command):
    """Steps run from this one on, links that are down are set up first."""

    plan_epoch: int
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HoldSteps(Command):
    """No step begins."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BeginExport(Command):
    """The adapter is being assembled and verified (Exported)."""

    plan_epoch: int


def standing_commands(record: JobRecord) -> tuple[Command, ...]:
    """What must be true while the record is as it is; repeated after a restart of the coordinator."""
    job_id, epoch = record.job_id, record.plan_epoch
    start_runner = StartRunner(job_id=job_id)
    fence = StopWorkers(job_id=job_id, before_epoch=epoch)
    release = ReleaseReservation(job_id=job_id)
    replan = Replan(job_id=job_id, plan_epoch=epoch)
    start_workers = StartWorkers(job_id=job_id, plan_epoch=epoch, restore_step=record.start_step)
    match record.state:
        case JobState.SUBMITTED:
            return (start_runner,)
        case JobState.PLANNING:
            return (start_runner, release, replan)
        case JobState.LOADING:
            return (start_runner, start_workers)
        case JobState.RUNNING:
            return (start_runner, start_workers, BeginSteps(job_id=job_id, plan_epoch=epoch, step=record.next_step))
        case JobState.RECOVERING:
            if record.plan_json is None:
                return (start_runner, fence, release, replan)
            return (start_runner, fence, start_workers)
        case JobState.PAUSED:
            if record.plan_json is None:
                return (start_runner, HoldSteps(job_id=job_id), fence, release)
            return (start_runner, HoldSteps(job_id=job_id), start_workers)
        case JobState.PARKED:
            return (start_runner, fence, release, replan)
        case JobState.FINALIZING:
            return (start_runner, start_workers, BeginExport(job_id=job_id, plan_epoch=epoch))
        case JobState.SUCCEEDED | JobState.CANCELLED | JobState.FAILED:
            return (StopWorkers(job_id=job_id, before_epoch=epoch + 1), release, StopRunner(job_id=job_id))
