"""Workers and devices that are lost under a job: it goes back to what is durable, or fails with the reason."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from coordinator.jobs.lineage import exactly_once_violations
from plutino.job.spec import JobSpec
from tests.integration.job_cases import adapter_bytes, addresses_of, attach, expected_samples, lineage_rows, start
from tests.integration.stack import ThreadCoordinator, losses, wait_until
from tests.integration.step_gate import StepGate


def test_worker_lost_in_training_job_returns_to_durable_step_and_ends_bit_equal(
    cleanup: ExitStack,
    gate: StepGate,
    tmp_path: Path,
    job: Callable[..., JobSpec],
    undisturbed: tuple[list[float], bytes],
) -> None:
    people, agents = start(cleanup, tmp_path / "state", 3)
    # Four steps are durable then, and the fifth is not.
    gate.hold_at(5)
    job_id = people.submit(job(eval_every=4))
    people.wait_for_step(job_id, 5)
    agent = next(agent for agent in agents if agent.sessions)
    agent.lose_worker(next(iter(agent.sessions)))
    gate.open()

    assert people.wait(job_id).state == "succeeded", people.job(job_id)
    detail = people.detail(job_id)
    assert (losses(detail), adapter_bytes(tmp_path / "adapter")) == undisturbed
    assert detail["recoveries"] == 1
    assert any(row["status"] == "undone" for row in detail["ledger"])
    assert exactly_once_violations(lineage_rows(detail), expected_samples()) == ()


def test_worker_that_runs_out_of_memory_on_the_only_device_fails_the_job_with_the_numbers(
    cleanup: ExitStack, tmp_path: Path, job: Callable[..., JobSpec]
) -> None:
    people, (agent,) = start(cleanup, tmp_path / "state", 1)
    job_id = people.submit(job(stages=1, steps=500))
    people.wait_for_step(job_id, 1)

    agent.lose_worker(next(iter(agent.sessions)), "used 512 MiB of 500 MiB", out_of_memory=True)

    summary = people.wait(job_id)
    assert summary.state == "failed"
    assert "512 MiB of 500 MiB" in summary.reason
    assert not (tmp_path / "adapter").exists()


def test_device_that_vanishes_while_loading_fails_the_job_with_the_reason(
    cleanup: ExitStack, tmp_path: Path, job: Callable[..., JobSpec]
) -> None:
    people, (agent,) = start(cleanup, tmp_path / "state", 1, lease_s=1.0)
    agent.ignore_commands()
    job_id = people.submit(job(stages=1))
    wait_until(lambda: people.job(job_id).state == "loading", "loading")

    agent.close()

    summary = people.wait(job_id)
    assert (summary.state, summary.step) == ("failed", 0)
    assert "device0 was not heard of for" in summary.reason and "its lease is 1.0 s" in summary.reason
    wait_until(lambda: all(device["reserved_bytes"] == 0 for device in people.devices()), "memory freed")


def test_device_that_dies_together_with_the_coordinator_is_not_waited_for(
    cleanup: ExitStack,
    gate: StepGate,
    tmp_path: Path,
    job: Callable[..., JobSpec],
    undisturbed: tuple[list[float], bytes],
) -> None:
    coordinator = ThreadCoordinator(tmp_path / "state")
    cleanup.callback(lambda: coordinator.close())
    people, agents = attach(cleanup, *addresses_of(coordinator), 3)
    gate.hold_at(5)
    job_id = people.submit(job(eval_every=4))
    people.wait_for_step(job_id, 5)
    doomed = next(agent for agent in agents if agent.sessions)

    coordinator.close()
    gate.open()
    doomed.close()
    coordinator = ThreadCoordinator(tmp_path / "state", lease_s=1.0)

    assert people.wait(job_id).state == "succeeded", people.job(job_id)
    detail = people.detail(job_id)
    assert detail["recoveries"] == 1
    assert (losses(detail), adapter_bytes(tmp_path / "adapter")) == undisturbed
