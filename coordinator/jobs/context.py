"""What all parts of a job's driver share: the record, the way to write it, and the way to the job's processes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from coordinator.artifacts.shadows import ShadowStore
from coordinator.artifacts.traces import TraceStore
from coordinator.fleet.registry import FleetRegistry
from coordinator.jobs.events import Event
from coordinator.jobs.lineage import EvaluationRow, LedgerRow
from coordinator.jobs.move_times import LINK, MoveTimes
from coordinator.jobs.record import JobRecord
from coordinator.jobs.recovery import Shadow, durable_steps
from coordinator.jobs.runner_link import RunnerLink
from coordinator.jobs.state import Transition, transition
from coordinator.jobs.tracing import TraceGatherer
from coordinator.jobs.worker_link import JobWorkers
from coordinator.scheduling.problem import PlanningProblem
from coordinator.scheduling.scheduler import Reservation
from coordinator.storage.base import Change, Store
from partitioner.plan import Plan
from plutino.errors import WireError
from plutino.events import JobEvent, JobStateChanged, WorkerName
from plutino.job.numerics import NumericsRecord
from plutino.job.spec import JobSpec
from plutino.types import AgentId, JobId, Unit, UnitKind, WorkerRef
from protos import workers_pb2 as pb

logger = logging.getLogger(__name__)

_SERIALS_AT_ONCE = 64


@dataclass(slots=True, kw_only=True)
class TrialTerms:
    """What trials of one sweep that need the same stages share in the coordinator's process."""

    specs: tuple[JobSpec, ...]
    """Of all these trials: one plan must hold each of them."""
    keeps_stage_s: float
    problem: PlanningProblem | None = None
    """What the first of them was planned from; None before, and after a restart between two of them."""
    plan: Plan | None = None


class JobContext:
    """One live job in the coordinator's process."""

    def __init__(
        self,
        record: JobRecord,
        *,
        store: Store,
        fleet: FleetRegistry,
        workers: JobWorkers,
        runner: RunnerLink,
        shadow_files: ShadowStore,
        traces: TraceStore,
        coordinator_address: str,
        bulk_address: str,
        on_events: Callable[[JobId], None],
        trial: TrialTerms | None = None,
    ) -> None:
        self.record = record
        self.spec = JobSpec.model_validate_json(record.spec_json)
        self.store = store
        self.fleet = fleet
        self.workers = workers
        self.runner = runner
        self.shadow_files = shadow_files
        self.traces = traces
        self.coordinator_address = coordinator_address
        self.bulk_address = bulk_address
        self._on_events = on_events
        self.move_times: MoveTimes | None = None
        """Set while the job moves to another plan and no worker has failed."""
        self.trial = trial
        """What the job shares with the other trials of its sweep; None: it is no trial."""
        self._serials: list[int] = []
        self._traced = TraceGatherer()
        self._plan: tuple[str, Plan] | None = None
        self.slowest_upload_s: float | None = None
        """Seconds of the slowest shadow upload so far; None before the first."""
        self.shadow_lock = asyncio.Lock()
        self.excluded_devices: dict[AgentId, str] = {}
        """Devices that this job does not use again, with the reason."""

    @property
    def job_id(self) -> JobId:
        """The job's id."""
        return self.record.job_id

    @property
    def keeps_stage_s(self) -> float:
        """How long workers wait with their stages for another job after this one."""
        return 0.0 if self.trial is None else self.trial.keeps_stage_s

    @property
    def job_dir(self) -> Path:
        """Where the coordinator keeps the job's files."""
        return self.shadow_files.job_dir(self.job_id)

    @property
    def plan(self) -> Plan:
        """The plan of the present plan epoch."""
        plan_json = self.record.plan_json
        assert plan_json is not None, f"job {self.job_id} has no plan while {self.record.state}"
        if self._plan is None or self._plan[0] is not plan_json:
            # Asked for several times a commit; parsing takes 0.14 ms for two stages.
            self._plan = (plan_json, Plan.model_validate_json(plan_json))
        return self._plan[1]

    @property
    def numerics(self) -> NumericsRecord:
        """What fixes the job's bits."""
        assert self.record.numerics_json is not None, f"job {self.job_id} has no numerics record yet"
        return NumericsRecord.model_validate_json(self.record.numerics_json)

    def refs(self) -> dict[WorkerRef, AgentId]:
        """The plan's workers and the devices they run on."""
        return {
            WorkerRef(self.job_id, self.record.plan_epoch, stage.stage_index, replica): AgentId(agent_id)
            for stage in self.plan.stages
            for replica, agent_id in enumerate(stage.agent_ids)
        }

    def worker_name(self, ref: WorkerRef) -> WorkerName:
        """A worker as people know it."""
        device_name = self.plan.stages[ref.stage_index].device_names[ref.replica_index]
        return WorkerName(stage_index=ref.stage_index, replica_index=ref.replica_index, device_name=device_name)

    def end_move_part(self, part: str) -> None:
        """A part of a move is over; nothing happens while the job does not move."""
        if self.move_times is not None:
            self.move_times.end(part)

    async def end_move(self) -> None:
        """The new plan's workers are loaded and linked; tell people what a move cost, if this was one."""
        if (times := self.move_times) is not None:
            times.end(LINK)
            loaded = [status.loaded for status in self.workers.statuses if status.loaded is not None]
            self.move_times = None
            await self.tell(times.told(self.record.plan_epoch, loaded))

    async def apply(
        self,
        event: Event,
        *,
        ledger_row: LedgerRow | None = None,
        evaluation: EvaluationRow | None = None,
        reservations: Sequence[Reservation] = (),
        events: Sequence[JobEvent] = (),
    ) -> Transition:
        """Make an event true: decide, write, and only then let anybody know.

        Raises:
            InvalidTransitionError: the job's state does not allow the event.
        """
        before = self.record
        step = transition(before, event, now_s=time.time())
        seen = list(events)
        if (step.record.state, step.record.reason) != (before.state, before.reason):
            seen.append(state_event(step.record))
        change = Change(
            before=before,
            after=step.record,
            event=type(event).__name__,
            at_s=time.time(),
            ledger_row=ledger_row,
            evaluation=evaluation,
            reservations=tuple(reservations),
            events=tuple(seen),
        )
        # A write that was handed in happens: a cancelled driver must leave with the record as it is stored.
        write = asyncio.create_task(self._write(change, step.record))
        try:
            await asyncio.shield(write)
        except asyncio.CancelledError:
            await write
            raise
        return step

    async def tell(self, *events: JobEvent) -> None:
        """Let people see something that decides nothing."""
        await asyncio.wrap_future(self.store.append_events(self.job_id, events, at_s=time.time()))
        self._on_events(self.job_id)

    def tell_later(self, *events: JobEvent) -> None:
        """Like :meth:`tell`, without waiting for the disk; the order of what is told stays."""
        loop = asyncio.get_running_loop()
        written = self.store.append_events(self.job_id, events, at_s=time.time())
        written.add_done_callback(lambda _: loop.call_soon_threadsafe(self._on_events, self.job_id))

    def durable(self) -> dict[int, tuple[Shadow, ...]]:
        """Steps to which the job could return, each with the shadows that hold its state."""
        return durable_steps(self.store.shadows(self.job_id), frozenset(self.record.parameter_names))

    def take_trace(self, ref: WorkerRef, message: pb.StepTrace) -> None:
        """Take in what a worker recorded of a step; the whole step is written once all have told."""
        try:
            trace = self._traced.add(ref, message, self.refs())
        except WireError as error:
            logger.warning("%s", error)
            return
        if trace is not None:
            written = asyncio.get_running_loop().run_in_executor(None, self.traces.put_step, self.job_id, trace)
            written.add_done_callback(_log_failure)

    async def new_unit(self, kind: UnitKind) -> Unit:
        """A unit whose serial no unit of this job ever had."""
        if not self._serials:
            block = await asyncio.wrap_future(self.store.allocate_unit_serials(self.job_id, _SERIALS_AT_ONCE))
            self._serials = list(block)
        return Unit(kind, self._serials.pop(0))

    async def _write(self, change: Change, after: JobRecord) -> None:
        await asyncio.wrap_future(self.store.save(change))
        self.record = after
        self._on_events(self.job_id)


def _log_failure(written: asyncio.Future[None]) -> None:
    if not written.cancelled() and (error := written.exception()) is not None:
        logger.warning("a recorded step is not kept: %s", error)


def state_event(record: JobRecord) -> JobStateChanged:
    """A record's state as people see it."""
    return JobStateChanged(
        state=record.state.value, reason=record.reason, next_step=record.next_step, total_steps=record.total_steps
    )
