"""Design section 14, promise 4: exactly once on the surviving lineage, after any sequence of faults.

A little coordinator over the store, the barrier's outcome and the recovery decision; hypothesis plays the world.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from coordinator.jobs.events import AllLoaded, Event, Planned, StepCommitted, StepSkipped
from coordinator.jobs.lineage import LedgerRow, LedgerStatus, exactly_once_violations, judge_evaluations, next_step
from coordinator.jobs.record import JobRecord, JobState
from coordinator.jobs.recovery import Incident, Shadow, decide_recovery, recovery_event
from coordinator.jobs.state import transition
from coordinator.storage.base import Change
from coordinator.storage.memory import MemoryStore
from plutino.errors import StoreError
from plutino.types import JobId, WorkerRef

JOB = JobId("job-1")
NAMES = ("a", "b")
NUM_STEPS, BATCH_ROWS = 12, 2


def batch(step: int) -> tuple[int, ...]:
    return tuple(range(step * BATCH_ROWS, (step + 1) * BATCH_ROWS))


@dataclass
class World:
    store: MemoryStore = field(default_factory=MemoryStore)
    shadow_serial: int = 0

    def __post_init__(self) -> None:
        self.store.submit(
            JobRecord(
                job_id=JOB,
                name="job",
                spec_json="{}",
                submitted_at_s=0.0,
                state=JobState.RUNNING,
                plan_json="{}",
                total_steps=NUM_STEPS,
                parameter_names=NAMES,
            )
        ).result()

    @property
    def job(self) -> JobRecord:
        return self.store.job(JOB)

    def happen(self, event: Event, row: LedgerRow | None = None) -> None:
        before = self.job
        after = transition(before, event, now_s=0.0).record
        name = type(event).__name__
        self.store.save(Change(before=before, after=after, event=name, at_s=0.0, ledger_row=row)).result()

    def decide_step(self, status: LedgerStatus) -> None:
        job = self.job
        if job.state is not JobState.RUNNING or job.next_step == NUM_STEPS:
            return
        step = job.next_step
        row = LedgerRow(step=step, plan_epoch=job.plan_epoch, status=status, sample_indices=batch(step))
        is_committed = status is LedgerStatus.COMMITTED
        self.happen(StepCommitted(step=step) if is_committed else StepSkipped(step=step, reason="inf"), row)

    def store_shadow(self, name: str, *, epochs_ago: int, steps_ago: int) -> None:
        """A shadow of the present step, or one that comes late from an older plan epoch."""
        job = self.job
        self.shadow_serial += 1
        shadow = Shadow(
            shadow_id=f"s{self.shadow_serial:04}",
            step=max(0, job.next_step - steps_ago),
            plan_epoch=job.plan_epoch - epochs_ago,
            sha256="0",
            bytes=1,
            parameter_names=(name,),
        )
        error = self.store.add_shadow(JOB, shadow).exception()
        assert isinstance(error, StoreError) == (epochs_ago > 0)

    def lose(self, *, is_state_lost: bool) -> None:
        job = self.job
        decision = decide_recovery(
            Incident(
                reason="gone",
                lost=(WorkerRef(JOB, job.plan_epoch, 0),) if is_state_lost else (),
                next_step=job.next_step,
                parameter_names=frozenset(NAMES),
                shadows=self.store.shadows(JOB),
                recoveries=job.recoveries,
                max_recoveries=10**6,
            )
        )
        self.happen(recovery_event(decision, judge_evaluations(self.store.evaluations(JOB))))

    def heal(self) -> None:
        if self.job.state is JobState.RUNNING:
            return
        if self.job.plan_json is None:
            self.happen(Planned(plan_json="{}", numerics_json="{}"))
        self.happen(AllLoaded(parameter_names=NAMES))


ACTIONS = st.one_of(
    st.just(("step", LedgerStatus.COMMITTED)),
    st.just(("step", LedgerStatus.COMMITTED)),
    st.just(("step", LedgerStatus.SKIPPED)),
    st.tuples(st.just("shadow"), st.sampled_from(NAMES), st.integers(0, 1), st.integers(0, 2)),
    st.tuples(st.just("lose"), st.booleans()),
    st.just(("heal",)),
)


@given(st.lists(ACTIONS, max_size=60))
def test_ledger_after_any_faults_feeds_every_sample_exactly_once(actions: list[tuple]) -> None:  # type: ignore[type-arg]
    world = World()

    for action in actions:
        match action:
            case ("step", status):
                world.decide_step(status)
            case ("shadow", name, epochs_ago, steps_ago):
                world.store_shadow(name, epochs_ago=epochs_ago, steps_ago=steps_ago)
            case ("lose", is_state_lost):
                world.lose(is_state_lost=is_state_lost)
            case _:
                world.heal()
        ledger, job = world.store.ledger(JOB), world.job
        assert next_step(ledger) == job.next_step
        assert all(shadow.step <= job.next_step for shadow in world.store.shadows(JOB))
        expected = [index for step in range(job.next_step) for index in batch(step)]
        assert exactly_once_violations(ledger, expected) == ()

    world.heal()
    while world.job.next_step < NUM_STEPS:
        world.decide_step(LedgerStatus.COMMITTED)
    assert exactly_once_violations(world.store.ledger(JOB), range(NUM_STEPS * BATCH_ROWS)) == ()
