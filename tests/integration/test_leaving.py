"""Agents that are stopped in good order: nobody waits for a lease, which here is longer than any test."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from plutino.job.spec import JobSpec
from tests.integration.job_cases import adapter_bytes, addresses_of, attach, start
from tests.integration.stack import ThreadAgent, ThreadCoordinator, losses, wait_until
from tests.integration.step_gate import StepGate

LEASE_S = 900.0


def test_job_goes_on_without_a_device_that_says_goodbye_and_nobody_measures_again(
    cleanup: ExitStack,
    gate: StepGate,
    tmp_path: Path,
    job: Callable[..., JobSpec],
    undisturbed: tuple[list[float], bytes],
) -> None:
    people, agents = start(cleanup, tmp_path / "state", 3, lease_s=LEASE_S)
    gate.hold_at(5)
    job_id = people.submit(job(eval_every=4))
    people.wait_for_step(job_id, 5)
    num_measured = [agent.num_profiles for agent in agents]
    leaver = next(agent for agent in agents if agent.sessions)
    gate.open()
    leaver.leave()

    assert people.wait(job_id).state == "succeeded", people.job(job_id)
    detail = people.detail(job_id)
    assert (losses(detail), adapter_bytes(tmp_path / "adapter")) == undisturbed
    assert detail["recoveries"] == 1
    assert [agent.num_profiles for agent in agents] == num_measured
    (left,) = [device for device in people.devices() if device["name"] == leaver.name]
    assert (left["state"], left["reason"]) == ("left", f"{leaver.name} left: its agent was ended")


def test_job_on_the_only_device_goes_on_when_its_agent_is_started_again(
    cleanup: ExitStack, gate: StepGate, tmp_path: Path, job: Callable[..., JobSpec]
) -> None:
    coordinator = ThreadCoordinator(tmp_path / "state", lease_s=LEASE_S)
    cleanup.callback(coordinator.close)
    people, (agent,) = attach(cleanup, *addresses_of(coordinator), 1)
    gate.hold_at(5)
    job_id = people.submit(job(stages=1))
    people.wait_for_step(job_id, 5)
    gate.open()

    agent.leave()
    wait_until(lambda: people.job(job_id).state == "recovering", "the goodbye")
    again = ThreadAgent(coordinator.endpoints.devices_address, agent.name)
    cleanup.callback(again.close)

    assert people.wait(job_id).state == "succeeded", people.job(job_id)
    assert people.detail(job_id)["recoveries"] == 1
