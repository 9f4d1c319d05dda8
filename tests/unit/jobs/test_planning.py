from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from coordinator.fleet.agent_link import OnMilestone, ProfileAnswer
from coordinator.fleet.membership import Device
from coordinator.jobs.planning import make_problem
from coordinator.jobs.prepared import PreparedData
from coordinator.jobs.profiler import Profiler
from coordinator.scheduling.problem import PlanningProblem
from partitioner.device import BlockTimings, ProfileRequest
from partitioner.explain import explain
from plutino.assets import SNIPS_DIR, TINY_LLAMA_DIR
from plutino.errors import AgentError, InfeasiblePlanError
from plutino.job.model import Packing
from plutino.job.numerics import NumericsRecord
from plutino.job.spec import parse_spec
from plutino.sizes import MIB
from plutino.types import AgentId, JobId

PREPARED = PreparedData(
    num_train=100,
    num_eval=0,
    num_truncated=0,
    total_steps=10,
    row_tokens=64,
    label_tokens_per_row=8,
    prompt_tokens=0,
    stop_token_ids=(3,),
    mean_row_tokens=40.0,
)


class FakeFleet:
    """Two devices of one size that count how often they are measured."""

    def __init__(self, budget_mib: int, slowdowns: tuple[float, ...] = ()) -> None:
        self.num_measured = 0
        self.measured: list[str] = []
        self.fresh: list[bool] = []
        self.have_kept: set[str] = set()
        self._slowdowns = slowdowns
        self.devices = [
            Device(
                agent_id=AgentId(f"a-{name}"),
                name=name,
                host_id="one",
                memory_budget_bytes=budget_mib * MIB,
                baseline_bytes=300 * MIB,
                threads=1,
            )
            for name in ("left", "right")
        ]

    async def kept_profile(self, agent_id: AgentId, request: ProfileRequest) -> BlockTimings | None:
        return self._timings(1.0) if agent_id in self.have_kept else None

    async def profile(
        self, agent_id: AgentId, request: ProfileRequest, on_milestone: OnMilestone | None = None
    ) -> ProfileAnswer:
        slowdown = self._slowdowns[self.num_measured] if self._slowdowns else 1.0
        self.num_measured += 1
        self.measured.append(str(agent_id))
        self.fresh.append(request.is_fresh)
        await asyncio.sleep(0)  # like a device, it does not answer at once
        return ProfileAnswer(self._timings(slowdown))

    def _timings(self, slowdown: float) -> BlockTimings:
        return BlockTimings(
            forward_s=0.01 * slowdown,
            backward_s=0.02,
            embedding_s=0.0,
            head_forward_s=0.01,
            head_backward_s=0.01 * slowdown,
        )


class ProductFleet(FakeFleet):
    """Of which one device runs blocks so many times as fast when integers are multiplied, or cannot at all."""

    def __init__(self, gain: float | None) -> None:
        super().__init__(budget_mib=4000)
        self._gain = gain

    async def profile(
        self, agent_id: AgentId, request: ProfileRequest, on_milestone: OnMilestone | None = None
    ) -> ProfileAnswer:
        found = await super().profile(agent_id, request, on_milestone)
        if request.packing.products == "dequantised" or agent_id == "a-left":
            return found
        if self._gain is None:
            raise AgentError("integers cannot be multiplied here")
        gained = found.timings.model_copy(update={"forward_s": found.timings.forward_s / self._gain})
        return ProfileAnswer(gained, is_kept=False)


def problem(
    fleet: FakeFleet,
    micro_batch_size: int | None,
    numerics: NumericsRecord | None = None,
    **changes: dict[str, object],
) -> PlanningProblem:
    values = {
        "model": {"path": str(TINY_LLAMA_DIR), "dtype": "fp32", **changes.get("model", {})},
        "data": {"train": str(SNIPS_DIR / "train.jsonl")},
        "training": {"steps": 10, "batch_size": 512, "micro_batch_size": micro_batch_size},
        **{part: changes[part] for part in ("method", "placement") if part in changes},
    }
    return asyncio.run(
        make_problem(
            JobId("j"),
            parse_spec(values, base_dir=SNIPS_DIR),
            PREPARED,
            fleet,  # type: ignore[arg-type]
            Profiler(fleet),  # type: ignore[arg-type]
            numerics=numerics,
            excluded={},
            is_started=numerics is not None,
        )
    )


def test_make_problem_micro_batch_that_fits_nowhere_is_refused_without_measuring_a_device():
    fleet = FakeFleet(budget_mib=500)

    with pytest.raises(InfeasiblePlanError, match=r"does not fit.*Way out: .*micro"):
        problem(fleet, micro_batch_size=512)

    assert fleet.num_measured == 0


def test_make_problem_job_whose_micro_batches_may_shrink_is_measured():
    fleet = FakeFleet(budget_mib=500)

    problem(fleet, micro_batch_size=None)

    assert fleet.num_measured == 4


class LossyFleet(FakeFleet):
    """Whose devices are measured without a neighbour that was lost."""

    async def profile(
        self, agent_id: AgentId, request: ProfileRequest, on_milestone: OnMilestone | None = None
    ) -> ProfileAnswer:
        found = await super().profile(agent_id, request, on_milestone)
        return replace(found, lacked_company=agent_id == "a-left")


@pytest.mark.parametrize("other_host", ["one", "two"])
def test_hosts_of_a_device_without_much_room_are_measured_without_a_kept_heap_as_well(other_host):
    fleet = FakeFleet(budget_mib=4000)
    small, large = fleet.devices
    fleet.devices = [replace(small, memory_budget_bytes=400 * MIB), replace(large, host_id=other_host)]
    asked = {}
    measure = fleet.profile

    async def profile(agent_id: AgentId, request: ProfileRequest, on_milestone: OnMilestone) -> ProfileAnswer:
        asked[agent_id] = request.is_tight
        return await measure(agent_id, request, on_milestone)

    fleet.profile = profile
    problem(fleet, 4)

    assert asked == {small.agent_id: True, large.agent_id: other_host == small.host_id}


def test_plan_says_which_of_its_devices_was_measured_without_a_neighbour():
    plan = problem(LossyFleet(budget_mib=4000), 4, placement={"stages": 2}).plan()

    (remark,) = plan.remarks
    assert remark.what == "left" and "the coordinator was not heard in time" in remark.why
    assert "remarks" in explain(plan) and remark.why in " ".join(explain(plan).split())


INT8_BESIDE = {"model": {"quantization": "int8"}, "method": {"type": "parallel_adapters", "reduction": 4}}


@pytest.mark.parametrize(("gain", "products"), [(1.5, "integer"), (1.05, "dequantised"), (None, "dequantised")])
def test_int8_layers_that_want_no_gradient_multiply_as_the_fleet_is_faster(gain, products):
    found = problem(ProductFleet(gain), 4, **INT8_BESIDE)

    assert found.shape.packing == Packing(scheme="int8", products=products)
    assert len(found.devices) == 2
    # The sum of both devices' rates, of which one gains.
    expected = "cannot be multiplied here" if gain is None else f"{(1 + gain) / 2:.2f} times the rate"
    assert expected in found.packing_why
    plan = explain(found.plan())
    assert ("multiplied as integers" in plan) == (products == "integer")
    assert expected in plan


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"quantization": "int8"}},
        {"model": {"quantization": "nf4"}, "method": INT8_BESIDE["method"]},
        {"model": {"quantization": "int8", "integer_products": "never"}, "method": INT8_BESIDE["method"]},
        {**INT8_BESIDE, "method": {**INT8_BESIDE["method"], "init": "fisher"}},
    ],
)
def test_other_jobs_are_measured_once_and_never_multiply_integers(changes):
    fleet = ProductFleet(gain=5.0)

    assert problem(fleet, 4, **changes).shape.packing.products == "dequantised"
    assert fleet.num_measured == 4


@pytest.mark.parametrize(("init", "allows"), [("pruning", True), ("fisher", False)])
def test_workers_share_a_stage_unless_its_start_follows_from_all_rows(init, allows):
    method = {**INT8_BESIDE["method"], "init": init}

    assert problem(ProductFleet(gain=5.0), 4, method=method).allow_replicas is allows


def test_later_plans_keep_the_products_of_the_numerics_record():
    packing = Packing(scheme="int8", products="integer")
    record = NumericsRecord(
        dtype="fp32",
        packing=packing,
        attention="sdpa",
        micro_batch_size=4,
        threads_per_worker=1,
        codecs="raw",
        versions={},
    )
    fleet = ProductFleet(gain=0.1)

    found = problem(fleet, 4, record, **INT8_BESIDE)

    assert (found.shape.packing, fleet.num_measured) == (packing, 4)


def test_how_sums_travel_is_priced_and_written_into_the_first_record():
    found = problem(FakeFleet(budget_mib=4000), 4, placement={"sums": "fp16"})

    assert (found.shape.sums, found.shape.sum_bytes) == ("fp16", 2)
    assert record_with().sums == "fp32"  # of a job that was stored without it


def record_with(**changes):
    fields = {
        "dtype": "fp32",
        "attention": "sdpa",
        "micro_batch_size": 2,
        "threads_per_worker": 1,
        "codecs": "raw",
        "versions": {},
    }
    return NumericsRecord(**(fields | changes))


@pytest.mark.parametrize(
    ("placement", "codecs"),
    [
        ({}, ()),
        ({"codec": "bf16"}, ()),
        ({"codec": "auto"}, ("raw", "bf16")),
        ({"numerics": "free"}, ("raw", "bf16")),
        ({"numerics": "free", "codec": "bf16"}, ()),
    ],
)
def test_first_plan_chooses_micro_batch_and_codec_and_a_plan_under_a_record_neither(placement, codecs):
    changes = {"model": {"dtype": "fp32"}, "placement": placement}

    first, later = (problem(FakeFleet(4000), None, record, **changes) for record in (None, record_with()))

    assert (first.is_micro_batch_free, first.codecs) == (True, codecs)
    assert (later.is_micro_batch_free, later.codecs, later.shape.micro_batch_rows) == (False, (), 2)


def dtype_fleet(budget_mib: int, **changes: object) -> FakeFleet:
    fleet = FakeFleet(budget_mib)
    fleet.devices = [replace(device, **changes) for device in fleet.devices]  # type: ignore[arg-type]
    return fleet


TIGHT_MIB = 486
"""Room for the job in bf16 and not in fp32."""
AUTO_DTYPE = {"model": {"dtype": "auto"}}


@pytest.mark.parametrize(
    ("budget_mib", "dtypes", "dtype"),
    [
        (4000, ("fp32", "bf16"), "fp32"),
        (TIGHT_MIB, ("fp32", "bf16"), "bf16"),
        (4000, ("bf16", "fp32"), "bf16"),
    ],
    ids=["roomy", "tight", "fast"],
)
def test_slow_bf16_is_taken_where_memory_needs_it_and_priced_at_what_devices_measure_in_it(budget_mib, dtypes, dtype):
    fleet = dtype_fleet(budget_mib, dtypes=dtypes)
    asked = []
    measure = fleet.profile

    async def profile(agent_id: AgentId, request: ProfileRequest, on_milestone: OnMilestone) -> ProfileAnswer:
        asked.append(request.dtype)
        return await measure(agent_id, request, on_milestone)

    fleet.profile = profile
    found = problem(fleet, 64, **AUTO_DTYPE)

    assert (found.shape.dtype, set(asked)) == (dtype, {dtype})
    because = "bf16, because the job does not fit in fp32; fp32 is faster on left, right"
    assert (because in explain(found.plan())) == (budget_mib == TIGHT_MIB)


def test_dtype_that_a_device_keeps_back_is_told_with_the_factor():
    fleet = FakeFleet(budget_mib=4000)
    slow, fine = fleet.devices
    fleet.devices = [
        replace(slow, dtypes=("fp32",), slow_dtypes={"bf16": 37.21}),
        replace(fine, dtypes=("fp32", "bf16")),
    ]

    plan = problem(fleet, 4, model={"dtype": "bf16"}).plan()

    (unused,) = plan.unused_devices
    why = "does not run bf16, only fp32: its bf16 takes 37.2 times fp32's seconds, and at most 4 are offered"
    assert (unused.what, unused.why) == ("left", why)


@pytest.mark.parametrize(("codecs", "borders"), [("raw", (3,)), ("bf16", ()), ("raw", ())])
def test_later_plans_keep_the_codecs_of_the_numerics_record(codecs, borders):
    record = record_with(codecs=codecs, bf16_borders=borders)

    found = problem(FakeFleet(4000), None, record, placement={"codec": "auto"})

    assert (found.shape.codec, found.shape.bf16_borders) == (codecs, borders)
