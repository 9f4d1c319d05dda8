from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.scheduling.scheduler import (
    MAX_RUNNING_FOR_BACKFILL,
    Decision,
    Offer,
    Park,
    Planner,
    QueuedJob,
    Refuse,
    Reservation,
    Reserve,
    Wait,
    decide,
    reservations_of,
)
from partitioner.device import BlockTimings, DeviceProfile
from partitioner.plan import Plan, StagePlan
from plutino.errors import InfeasiblePlanError
from plutino.types import AgentId, JobId

TIMINGS = BlockTimings(forward_s=1.0, backward_s=2.0, embedding_s=0.1, head_forward_s=0.1, head_backward_s=0.1)


def plan_of(pieces: dict[str, int]) -> Plan:
    stages = tuple(
        StagePlan(
            stage_index=index,
            start_block=index,
            end_block=index + 1,
            agent_ids=(agent_id,),
            device_names=(agent_id,),
            forward_s=1.0,
            backward_s=1.0,
            memory=(),
            job_bytes=num_bytes,
            baseline_bytes=0,
            budget_bytes=num_bytes,
            threads=1,
        )
        for index, (agent_id, num_bytes) in enumerate(pieces.items())
    )
    return Plan(
        stages=stages,
        micro_batch_rows=1,
        num_micro_batches=1,
        micro_batch_owners=((0,),) * len(stages),
        checkpointing=False,
        dtype="fp32",
        codec="raw",
        step_s=1.0,
        bubble_share=0.0,
        bottleneck="none",
        relief="none",
    )


def spreading(needs: dict[str, int]) -> Planner:
    """Fills devices in the order of their free memory until the job's need is met: more memory never hurts."""

    def plan(job_id: JobId, profiles: tuple[DeviceProfile, ...]) -> Plan:
        left, pieces = needs[job_id], {}
        for profile in sorted(profiles, key=lambda each: (-each.available_bytes, each.agent_id)):
            if left > 0:
                pieces[profile.agent_id] = min(left, profile.available_bytes)
                left -= pieces[profile.agent_id]
        if left > 0:
            raise InfeasiblePlanError(f"{job_id} misses {left} bytes")
        return plan_of(pieces)

    return plan


def whole(needs: dict[str, int]) -> Planner:
    """Puts a job on the one device that is freest."""

    def plan(job_id: JobId, profiles: tuple[DeviceProfile, ...]) -> Plan:
        best = max(profiles, key=lambda each: (each.available_bytes, each.agent_id))
        if best.available_bytes < needs[job_id]:
            raise InfeasiblePlanError(f"{job_id} needs {needs[job_id]}, the freest device has {best.available_bytes}")
        return plan_of({best.agent_id: needs[job_id]})

    return plan


def queued(*names: str, devices: str = "AB", is_started: bool = False) -> list[QueuedJob]:
    profiles = tuple(
        DeviceProfile(
            agent_id=device,
            name=device,
            host_id=device,
            threads=1,
            available_bytes=0,
            baseline_bytes=0,
            timings=TIMINGS,
        )
        for device in devices
    )
    return [QueuedJob(job_id=JobId(name), profiles=profiles, is_started=is_started) for name in names]


def offers(**budgets: int) -> list[Offer]:
    return [Offer(agent_id=AgentId(name), budget_bytes=budget) for name, budget in budgets.items()]


def held(name: str, device: str, num_bytes: int) -> Reservation:
    return Reservation(job_id=JobId(name), agent_id=AgentId(device), bytes=num_bytes)


def kinds(decisions: Sequence[Decision]) -> list[str]:
    return [type(decision).__name__ for decision in decisions]


def test_decide_job_that_fits_gets_all_its_devices_in_one_decision() -> None:
    decision = decide(queued("j"), [], offers(A=4, B=3), spreading({"j": 6}))[0]

    assert isinstance(decision, Reserve)
    assert decision.reservations == (held("j", "A", 4), held("j", "B", 2))


def test_decide_counts_reservations_of_running_and_of_just_placed_jobs() -> None:
    needs = {"j1": 3, "j2": 3, "j3": 3}

    decisions = decide(queued("j1", "j2", "j3"), [held("r", "A", 4)], offers(A=6, B=4), spreading(needs))

    assert kinds(decisions) == ["Reserve", "Reserve", "Wait"]


def test_decide_waiting_job_hears_who_holds_the_memory() -> None:
    decision = decide(queued("j"), [held("r", "A", 3 << 30)], offers(A=4 << 30), whole({"j": 2 << 30}))[0]

    assert decision == Wait(job_id=JobId("j"), reason="waits for memory: r holds 3.00 GiB of the 4.00 GiB on 1 devices")


def test_decide_job_too_big_for_the_empty_fleet_is_refused_and_blocks_nobody() -> None:
    decisions = decide(queued("big", "j"), [held("r", "A", 1)], offers(A=4), whole({"big": 9, "j": 3}))

    assert decisions[0] == Refuse(job_id=JobId("big"), reason="big needs 9, the freest device has 4")
    assert isinstance(decisions[1], Reserve)


def test_decide_started_job_too_big_for_what_is_left_is_parked() -> None:
    decision = decide(queued("j", is_started=True), [], offers(A=4), whole({"j": 9}))[0]

    assert isinstance(decision, Park)


def test_decide_device_that_left_is_not_planned_on_and_its_reservation_ignored() -> None:
    decision = decide(queued("j"), [held("r", "A", 4)], offers(B=4), whole({"j": 4}))[0]

    assert isinstance(decision, Reserve)
    assert decision.reservations == (held("j", "B", 4),)


def test_decide_without_any_usable_device_names_the_setting() -> None:
    decision = decide(queued("j", devices="C"), [], offers(A=4), whole({"j": 1}))[0]

    assert isinstance(decision, Refuse)
    assert "placement.devices" in decision.reason


def test_decide_backfill_that_takes_nothing_from_the_head_starts() -> None:
    """The head needs all of A whenever it may start; B is too small for it in any case."""
    decisions = decide(queued("head", "small"), [held("r", "A", 8)], offers(A=10, B=4), whole({"head": 9, "small": 3}))

    assert kinds(decisions) == ["Wait", "Reserve"]


def test_decide_backfill_that_leaves_the_head_both_its_chances_starts() -> None:
    running = [held("r1", "A", 8), held("r2", "B", 8)]

    decisions = decide(queued("head", "small"), running, offers(A=10, B=9), whole({"head": 9, "small": 1}))

    assert kinds(decisions) == ["Wait", "Reserve"]


def test_decide_backfill_that_would_take_one_of_the_heads_chances_waits() -> None:
    """The head may start on A when r1 ends or on B when r2 does; a small job on either could make it wait longer."""
    running = [held("r1", "A", 8), held("r2", "B", 8)]

    decisions = decide(queued("head", "small"), running, offers(A=9, B=9), whole({"head": 9, "small": 1}))

    assert kinds(decisions) == ["Wait", "Wait"]
    assert isinstance(decisions[1], Wait)
    assert "waits behind head, which needs this memory when r" in decisions[1].reason


def test_decide_with_many_running_jobs_lets_nobody_overtake() -> None:
    running = [held(f"r{index}", "A", 1) for index in range(MAX_RUNNING_FOR_BACKFILL + 1)]

    decisions = decide(queued("head", "small"), running, offers(A=10, B=1), whole({"head": 9, "small": 1}))

    assert kinds(decisions) == ["Wait", "Wait"]


def test_reservations_of_device_with_two_stages_are_summed() -> None:
    first, second = plan_of({"A": 3, "B": 4}), plan_of({"A": 5})
    plan = first.model_copy(update={"stages": first.stages + second.stages})

    assert reservations_of(JobId("j"), plan) == (held("j", "A", 8), held("j", "B", 4))


def test_decide_plan_larger_than_the_device_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError, match="takes 5 bytes of A, which has 4 free"):
        decide(queued("j"), [], offers(A=4), lambda job_id, profiles: plan_of({"A": 5}))


def first_start(order: Sequence[str], running: list[Reservation], budgets: list[Offer], planner: Planner) -> int:
    """After how many ends of running jobs the head can start."""
    for num_ended in range(len(order) + 1):
        left = [row for row in running if row.job_id not in order[:num_ended]]
        if isinstance(decide(queued("head"), left, budgets, planner)[0], Reserve):
            return num_ended
    raise AssertionError("the head never starts")


@settings(max_examples=60)
@given(
    sizes=st.lists(st.tuples(st.sampled_from("AB"), st.integers(1, 6)), min_size=1, max_size=3),
    budgets=st.tuples(st.integers(6, 12), st.integers(6, 12)),
    head=st.integers(1, 12),
    others=st.lists(st.integers(1, 8), max_size=2),
    is_spreading=st.booleans(),
)
def test_decide_backfill_never_delays_the_head_in_any_order_of_ends(
    sizes: list[tuple[str, int]], budgets: tuple[int, int], head: int, others: list[int], is_spreading: bool
) -> None:
    running = [held(f"r{index}", device, size) for index, (device, size) in enumerate(sizes)]
    fleet = offers(A=budgets[0], B=budgets[1])
    needs = {"head": head} | {f"j{index}": size for index, size in enumerate(others)}
    planner = (spreading if is_spreading else whole)(needs)
    decisions = decide(queued(*needs), running, fleet, planner)
    if not isinstance(decisions[0], Wait):
        return
    backfilled = [row for each in decisions if isinstance(each, Reserve) for row in each.reservations]

    for order in permutations(sorted({row.job_id for row in running})):
        assert first_start(order, running + backfilled, fleet, planner) == first_start(order, running, fleet, planner)


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    budgets=st.tuples(st.integers(1, 12), st.integers(1, 12)),
)
def test_decide_never_gives_more_than_a_device_has(sizes: list[int], budgets: tuple[int, int]) -> None:
    needs = {f"j{index}": size for index, size in enumerate(sizes)}

    decisions = decide(queued(*needs), [], offers(A=budgets[0], B=budgets[1]), spreading(needs))

    given_away = [row for each in decisions if isinstance(each, Reserve) for row in each.reservations]
    assert len(decisions) == len(sizes)
    for device, budget in zip("AB", budgets, strict=True):
        assert sum(row.bytes for row in given_away if row.agent_id == device) <= budget
