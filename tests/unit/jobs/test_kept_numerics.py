"""Whichever way a job comes to a new plan, what its numerics record fixes stays."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from coordinator.artifacts.traces import PlannedEpoch
from coordinator.fleet.membership import Device
from coordinator.jobs.events import Planned, Queued
from coordinator.jobs.job_scheduling import Scheduling
from coordinator.jobs.kept_numerics import broken_by, in_words, kept_problem
from coordinator.jobs.moving import ReadyMove, Replanner
from coordinator.jobs.phases import Phases
from coordinator.jobs.profiler import Profiler
from coordinator.jobs.record import JobState
from coordinator.jobs.replanning import as_running, corrected
from coordinator.scheduling.problem import PlanningProblem
from coordinator.scheduling.round import SchedulingAnswer, SchedulingRound, solve
from partitioner.plan import Plan
from plutino.assets import SNIPS_DIR, TINY_LLAMA_DIR
from plutino.errors import InfeasiblePlanError
from plutino.job.model import Packing
from plutino.job.numerics import NumericsRecord
from plutino.job.spec import parse_spec
from plutino.types import AgentId, JobId
from tests.unit.jobs.test_planning import PREPARED, FakeFleet, record_with
from tests.unit.jobs.test_replanning import problem_of
from tests.unit.partitioner.fleet import job as job_shape
from tests.unit.partitioner.fleet import llama


class Fleet(FakeFleet):
    """Devices that are there at once."""

    def __init__(self, budget_mib: int, names: tuple[str, ...] = ("left", "right")) -> None:
        super().__init__(budget_mib)
        self._away: Device | None = None
        self._num_asked = 0
        self.devices = [device for device in self.devices if device.name in names]

    async def settled(self) -> None:
        return

    async def settled_soon(self) -> None:
        return

    def name_of(self, agent_id: AgentId) -> str:
        return agent_id.removeprefix("a-")

    def come_back_when_asked_for(self, device: Device) -> None:
        self._away = device

    @property
    def returning(self) -> tuple[AgentId, ...]:
        """Who is asked about for the second time is back."""
        if self._away is None:
            return ()
        self._num_asked += 1
        if self._num_asked == 2:
            self.devices.append(self._away)
        return (self._away.agent_id,)

    def without(self, name: str) -> None:
        self.devices = [device for device in self.devices if device.name != name]


class Queue:
    """A round of scheduling for one job alone."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    async def place(self, job_id: JobId, problem: PlanningProblem, carry_out: Callable[..., Any]) -> None:
        budgets = {str(device.agent_id): device.memory_budget_bytes for device in self._fleet.devices}
        asked = SchedulingRound(queue=(problem,), held=(), budgets_bytes=budgets)
        (verdict,) = SchedulingAnswer.model_validate_json(solve(asked.model_dump_json())).verdicts
        assert await carry_out(verdict)


class Job:
    """A job's scheduling, with a record that is not stored."""

    def __init__(self, fleet: Fleet, **parts: Any) -> None:
        values = {
            "model": {"path": str(TINY_LLAMA_DIR), "dtype": "fp32"},
            "data": {"train": str(SNIPS_DIR / "train.jsonl")},
            "training": {"steps": 10, "batch_size": 8},
            **parts,
        }
        self.fleet = fleet
        self.plans: list[Plan] = []
        self.waited: list[str] = []
        self.planned: list[PlannedEpoch] = []
        record = SimpleNamespace(state=JobState.PLANNING, plan_epoch=1, numerics_json=None, total_steps=1, reason="")
        self._context: Any = SimpleNamespace(
            job_id=JobId("j"),
            spec=parse_spec(values, base_dir=SNIPS_DIR),
            record=record,
            fleet=fleet,
            trial=None,
            excluded_devices={},
            store=SimpleNamespace(reservations=lambda: ()),
            traces=SimpleNamespace(put_plan=self._put_plan, planned=lambda *_: self.planned[-1]),
            apply=self._apply,
        )
        self.start_coordinator()
        self.place()

    def start_coordinator(self) -> None:
        """What lives in the coordinator's process begins anew."""
        profiler = Profiler(self.fleet)  # type: ignore[arg-type]
        self.replanner, self.phases = Replanner(self._context, profiler), Phases(self._context.spec)
        self._scheduling = Scheduling(
            self._context,
            queue=Queue(self.fleet),  # type: ignore[arg-type]
            profiler=profiler,
            link_map=None,  # type: ignore[arg-type]
            replanner=self.replanner,
            phases=self.phases,
        )

    def place(self) -> Plan:
        asyncio.run(self._scheduling.place(PREPARED))
        return self.plans[-1]

    def place_again(self) -> Plan:
        """What follows a lost worker or a decided move."""
        self._context.record.state, self._context.record.plan_epoch = JobState.RECOVERING, 2
        return self.place()

    def move_to(self, plan: Plan, factors: dict[str, float]) -> None:
        problem = corrected(as_running(self.planned[0].problem, self.plans[0]), factors)
        self.replanner.move = ReadyMove(problem.model_copy(update={"known_plan": plan}), "another is faster")

    async def _apply(self, event: Planned | Queued, **_: object) -> None:
        if isinstance(event, Queued):
            self.waited.append(event.reason)
            return
        self._context.record.numerics_json = event.numerics_json
        self._context.numerics = NumericsRecord.model_validate_json(event.numerics_json)
        self.plans.append(Plan.model_validate_json(event.plan_json))

    def _put_plan(self, job_id: str, plan_epoch: int, planned: PlannedEpoch) -> None:
        self.planned.append(planned)


def lose_device(job: Job) -> None:
    job.phases.forget()
    job.fleet.without("right")


def join_device(job: Job) -> None:
    left = job.fleet.devices[0]
    job.fleet.devices.append(replace(left, agent_id=AgentId("a-third"), name="third"))


def slow_device_and_lose_it(job: Job) -> None:
    job.move_to(job.plans[0], {"a-right": 9.0})
    job.fleet.without("right")


def restart_and_lose_device(job: Job) -> None:
    job.start_coordinator()
    job.fleet.without("right")


def return_to_pipeline_and_lose_device(job: Job) -> None:
    job.phases.return_to_pipeline()
    job.fleet.without("right")


@pytest.mark.parametrize(
    "happens",
    [
        lose_device,
        join_device,
        slow_device_and_lose_it,
        restart_and_lose_device,
        return_to_pipeline_and_lose_device,
    ],
)
def test_new_plan_keeps_the_micro_batches_and_codecs_of_the_first_whatever_led_to_it(
    happens: Callable[[Job], None],
) -> None:
    job = Job(Fleet(budget_mib=4000), placement={"codec": "auto"})
    first = job.plans[0]
    one = Job(Fleet(budget_mib=4000, names=("left",)), placement={"codec": "auto"}).plans[0]
    assert len(first.agent_ids) == 2 and one.micro_batch_rows != first.micro_batch_rows, "or nothing could change"

    happens(job)
    again = job.place_again()

    assert again.agent_ids != first.agent_ids
    assert (again.micro_batch_rows, again.num_micro_batches) == (first.micro_batch_rows, first.num_micro_batches)
    assert set(again.bf16_borders) <= set(first.bf16_borders)


@pytest.mark.parametrize(
    ("happens", "measured"),
    [(lose_device, []), (restart_and_lose_device, []), (join_device, ["a-third"])],
)
def test_new_plan_takes_the_seconds_of_the_one_before_and_only_new_devices_measure(
    happens: Callable[[Job], None], measured: list[str]
) -> None:
    job = Job(Fleet(budget_mib=4000))
    num_before = len(job.fleet.measured)
    happens(job)

    job.place_again()

    assert job.fleet.measured[num_before:] == measured
    left, right = (as_running(planned.problem, job.plans[0]).devices[0].timings for planned in job.planned)
    assert left == right


def test_refusal_of_a_new_plan_says_what_the_record_fixes_and_the_way_out() -> None:
    job = Job(Fleet(budget_mib=368), training={"steps": 10, "batch_size": 64})
    rows = job.plans[0].micro_batch_rows
    lose_device(job)

    with pytest.raises(InfeasiblePlanError) as refusal:
        job.place_again()

    text = str(refusal.value)
    assert "does not fit" in text and f"fixes micro-batches of {rows} rows, fp32, unquantised weights" in text
    assert (
        f"training.micro_batch_size: {rows // 2} (now {rows})" in text
        and "one more device of" in text
        and "placement.numerics: free" in text
    )


def test_job_that_does_not_fit_waits_for_a_device_that_said_goodbye_a_moment_ago() -> None:
    job = Job(Fleet(budget_mib=368), training={"steps": 10, "batch_size": 64})
    right = job.fleet.devices[1]
    lose_device(job)
    job.fleet.come_back_when_asked_for(right)

    again = job.place_again()

    assert again.agent_ids == job.plans[0].agent_ids
    assert len(job.waited) == 1 and job.waited[0].startswith("waits for right to come back: the job does not fit")


def test_border_that_a_new_plan_has_inside_a_stage_is_still_rounded_by_the_plan_after_it() -> None:
    shape = job_shape(llama(4), micro_batch_rows=2).model_copy(update={"bf16_borders": (1, 2)})
    problem = problem_of(1, 1, num_blocks=4, shape=shape)
    plan = problem.plan()
    assert set(plan.bf16_borders) < {1, 2}

    assert as_running(problem, plan).shape.bf16_borders == (1, 2)


@pytest.mark.parametrize(
    ("changes", "broken"),
    [
        ({"micro_batch_size": 1}, "micro-batches of 2 instead of 1"),
        ({"dtype": "bf16"}, "dtype fp32 instead of bf16"),
        ({"packing": Packing(scheme="nf4")}, "weights held as"),
        ({"sums": "fp16"}, "sums in fp32 instead of fp16"),
        ({"codecs": "bf16"}, "at the border of block 2 codec raw instead of bf16"),
        ({"bf16_borders": (2,)}, "at the border of block 2 codec raw instead of bf16"),
        ({"bf16_borders": (1, 3)}, None),
    ],
)
def test_plan_that_has_something_otherwise_than_the_record_is_found(
    changes: dict[str, Any], broken: str | None
) -> None:
    shape = job_shape(llama(4), micro_batch_rows=2, exact_stages=2)
    problem = problem_of(1, 1, num_blocks=4, shape=shape)
    plan, record = problem.plan(), record_with(**changes)
    assert plan.stages[0].end_block == 2

    found = broken_by(plan, record)

    assert found is None if broken is None else found is not None and broken in found
    assert broken_by(kept_problem(problem, record).model_copy(update={"packing_why": ""}).plan(), record) is None


@pytest.mark.parametrize("cut", ["rows", "tokens"])
def test_memory_of_a_cut_by_tokens_is_billed_where_the_record_has_it(cut: str) -> None:
    shape = job_shape(llama(4), micro_batch_rows=2, may_cut_by_tokens=True)

    kept = kept_problem(problem_of(1, 1, num_blocks=4, shape=shape), record_with(micro_batch_cut=cut)).shape

    assert (kept.most_label_tokens > kept.label_tokens) == (cut == "tokens")


def test_record_in_words_counts_rows_and_names_threads() -> None:
    assert "micro-batches of 1 row, fp32" in in_words(record_with(micro_batch_size=1))
    assert "raw boundaries, 1 thread a worker" in in_words(record_with())
    assert "thread" not in in_words(record_with(threads_per_worker=None))
