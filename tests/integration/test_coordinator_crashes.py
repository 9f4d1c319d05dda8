"""Coordinators that are killed at named places, and started again: the job goes on as if nothing had been."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from coordinator.crash_points import CRASH_POINTS
from coordinator.jobs.lineage import exactly_once_violations
from plutino.job.spec import JobSpec
from protos import jobs_pb2
from tests.integration.job_cases import adapter_bytes, attach, expected_samples, lineage_rows
from tests.integration.stack import WAIT_S, People, ProcessCoordinator, ThreadAgent, losses
from tests.integration.step_gate import StepGate


def crash_and_restart(
    stack: ExitStack,
    tmp_path: Path,
    spec: JobSpec,
    crash_at: str,
    disturb: Callable[[People, list[ThreadAgent]], None] = lambda people, agents: None,
) -> tuple[dict[str, object], str]:
    """Run a job whose coordinator dies at a place and is started again; gives its detail and state."""
    state_dir = tmp_path / "state"
    # Ended after the agents, which hold streams that an ending server waits for.
    coordinators = [ProcessCoordinator(state_dir, crash_at=crash_at)]
    stack.callback(lambda: [coordinator.close() for coordinator in coordinators])
    endpoints = coordinators[0].endpoints
    people, agents = attach(stack, endpoints.devices_address, endpoints.people_address, 2)
    key = "the-only-job"
    try:
        people.submit(spec, key)
    except Exception:
        assert crash_at.startswith("job_stored")
    disturb(people, agents)
    coordinators[0].wait_for_crash()
    # A plan must wait until both agents are back.
    coordinators.append(ProcessCoordinator(state_dir, settle_s=1.5))
    assert coordinators[1].endpoints.devices_address == endpoints.devices_address
    job_id = people.submit(spec, key)  # the same key is the same job
    summary = people.wait(job_id)
    return people.detail(job_id), f"{summary.state} {summary.reason}"


# In a step and after the last: where a restart has most to put right.
SAMPLED = ("commit_half_sent:4", "adapter_assembled")


@pytest.mark.parametrize(
    "crash_at",
    [
        pytest.param(point, marks=() if point in SAMPLED else pytest.mark.slow)
        for name in CRASH_POINTS
        if name != "recovery_stored"
        for point in ([f"{name}:3", f"{name}:4"] if name.startswith(("step", "votes", "commit")) else [name])
    ],
)
def test_coordinator_killed_at_a_crash_point_and_restarted_job_ends_with_the_same_adapter(
    crash_at: str,
    cleanup: ExitStack,
    tmp_path: Path,
    job: Callable[..., JobSpec],
    undisturbed: tuple[list[float], bytes],
) -> None:
    detail, state = crash_and_restart(cleanup, tmp_path, job(eval_every=4), crash_at)

    assert state.startswith("succeeded"), state
    assert (losses(detail), adapter_bytes(tmp_path / "adapter")) == undisturbed
    assert detail["recoveries"] == 0, json.dumps(detail["transitions"], indent=1)
    assert exactly_once_violations(lineage_rows(detail), expected_samples()) == ()


@pytest.mark.slow
def test_coordinator_killed_after_a_loss_was_stored_and_restarted_job_ends_with_the_same_adapter(
    cleanup: ExitStack,
    gate: StepGate,
    tmp_path: Path,
    job: Callable[..., JobSpec],
    undisturbed: tuple[list[float], bytes],
) -> None:
    gate.hold_at(5)

    def lose_a_worker(people: People, agents: list[ThreadAgent]) -> None:
        (job_id,) = (summary.job_id for summary in people.stub.List(jobs_pb2.ListRequest(), timeout=WAIT_S).jobs)
        people.wait_for_step(job_id, 5)
        agents[1].lose_worker(next(iter(agents[1].sessions)))
        gate.open()

    detail, state = crash_and_restart(cleanup, tmp_path, job(eval_every=4), "recovery_stored", lose_a_worker)

    assert state.startswith("succeeded"), state
    assert (losses(detail), adapter_bytes(tmp_path / "adapter")) == undisturbed
    assert detail["recoveries"] == 1, json.dumps(detail["transitions"], indent=1)
    assert any(row["status"] == "undone" for row in detail["ledger"])  # type: ignore[attr-defined]
    assert exactly_once_violations(lineage_rows(detail), expected_samples()) == ()
