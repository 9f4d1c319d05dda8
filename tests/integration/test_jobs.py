"""Whole jobs over real gRPC: partitions, pausing, cancelling, queueing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from edge_node.engine.executor import StageExecutor
from edge_node.engine.unit import UnitInput
from edge_node.transport.base import UnitCancelledError
from plutino.assets import SNIPS_DIR, TINY_LLAMA_DIR
from plutino.job.spec import JobSpec
from plutino.types import Unit
from protos import jobs_pb2
from tests.integration.job_cases import STEPS, adapter_bytes, addresses_of, attach, cancel_request, start
from tests.integration.stack import WAIT_S, People, ThreadAgent, ThreadCoordinator, losses, make_spec, wait_until
from tests.integration.step_gate import StepGate


@pytest.mark.parametrize(
    ("more_stages", "steps", "loss_ratio"),
    [pytest.param((3,), 5, 0.8), pytest.param((2, 3, 4), 20, 0.5, marks=pytest.mark.slow)],
)
def test_snips_on_one_to_four_workers_gives_bit_equal_losses_and_adapters(
    cleanup: ExitStack, tmp_path: Path, more_stages: tuple[int, ...], steps: int, loss_ratio: float
) -> None:
    people, _ = start(cleanup, tmp_path / "state", 4)

    def run(stages: int) -> tuple[list[float], bytes]:
        output = tmp_path / f"adapter{stages}"
        spec = make_spec(
            TINY_LLAMA_DIR,
            SNIPS_DIR / "train.jsonl",
            output,
            data={"limit": 200},
            training={"steps": steps, "batch_size": 4, "micro_batch_size": 2, "lr": 2e-3},
            placement={"stages": stages},
            method={"type": "lora", "rank": 8, "dropout": 0.05},
        )
        job_id = people.submit(spec)
        summary = people.wait(job_id)
        assert summary.state == "succeeded", summary
        return losses(people.detail(job_id)), adapter_bytes(output)

    whole = run(1)
    assert len(whole[0]) == steps and whole[0][-1] < loss_ratio * whole[0][0]
    for stages in more_stages:
        assert run(stages) == whole


def test_job_of_two_stages_waits_for_its_second_device_and_one_of_more_stages_than_blocks_is_refused(
    cleanup: ExitStack, tmp_path: Path, job: Callable[..., JobSpec]
) -> None:
    coordinator = ThreadCoordinator(tmp_path / "state")
    cleanup.callback(coordinator.close)
    people, _ = attach(cleanup, *addresses_of(coordinator), 1)

    assert "blocks make at most" in people.wait(people.submit(job("many", stages=99))).reason
    job_id = people.submit(job())
    wait_until(lambda: "asks for 2 devices, and 1 attached" in people.job(job_id).reason, "the job waits")
    cleanup.callback(ThreadAgent(coordinator.endpoints.devices_address, "late").close)

    assert people.wait(job_id).state == "succeeded", people.job(job_id)


def test_cancel_frees_workers_memory_and_queue(cleanup: ExitStack, tmp_path: Path, job: Callable[..., JobSpec]) -> None:
    people, agents = start(cleanup, tmp_path / "state", 2)
    job_id = people.submit(job(steps=5000))
    people.wait_for_step(job_id, 2)

    answer = people.stub.Cancel(cancel_request(job_id), timeout=10)

    assert answer.state == "cancelled"
    wait_until(lambda: not any(agent.sessions for agent in agents), "workers ended")
    assert all(device["reserved_bytes"] == 0 for device in people.devices())
    assert not (tmp_path / "adapter").exists()


def test_paused_job_begins_no_step_and_resumed_ends_bit_equal(
    cleanup: ExitStack,
    gate: StepGate,
    tmp_path: Path,
    job: Callable[..., JobSpec],
    undisturbed: tuple[list[float], bytes],
) -> None:
    people, agents = start(cleanup, tmp_path / "state", 2)
    gate.hold_at(2)
    job_id = people.submit(job(eval_every=4))
    people.wait_for_step(job_id, 2)

    pausing = people.stub.Pause.future(jobs_pb2.PauseRequest(job_id=job_id), timeout=WAIT_S)
    # The step that the workers have begun ends first, however soon the wish comes.
    gate.open()
    assert pausing.result(WAIT_S).state == "paused"
    held = people.job(job_id).step
    assert any(agent.sessions for agent in agents)
    assert people.stub.Resume(jobs_pb2.ResumeRequest(job_id=job_id), timeout=10).state == "running"

    assert held <= people.wait(job_id).step == STEPS
    assert (losses(people.detail(job_id)), adapter_bytes(tmp_path / "adapter")) == undisturbed


def test_evaluation_of_a_single_worker_is_abandoned_when_the_job_is_paused(
    cleanup: ExitStack,
    tmp_path: Path,
    job: Callable[..., JobSpec],
    undisturbed: tuple[list[float], bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    evaluate, cancel = StageExecutor.evaluate_rows, StageExecutor.cancel
    began, cancelled = threading.Event(), threading.Event()
    outcomes: list[str] = []

    def evaluate_slowly(self: StageExecutor, work: UnitInput) -> tuple[float, dict[int, torch.Tensor]]:
        began.set()
        assert cancelled.wait(WAIT_S)
        try:
            found = evaluate(self, work)
        except UnitCancelledError:
            outcomes.append("cancelled")
            raise
        outcomes.append("done")
        return found

    def cancel_and_tell(self: StageExecutor, unit: Unit) -> None:
        cancel(self, unit)
        cancelled.set()

    monkeypatch.setattr(StageExecutor, "evaluate_rows", evaluate_slowly)
    monkeypatch.setattr(StageExecutor, "cancel", cancel_and_tell)
    people, _ = start(cleanup, tmp_path / "state", 1)
    job_id = people.submit(job(stages=1, eval_every=4))
    assert began.wait(WAIT_S)

    assert people.stub.Pause(jobs_pb2.PauseRequest(job_id=job_id), timeout=10).state == "paused"
    wait_until(lambda: outcomes, "the evaluation ended")
    assert people.stub.Resume(jobs_pb2.ResumeRequest(job_id=job_id), timeout=10).state == "running"

    assert people.wait(job_id).state == "succeeded", people.job(job_id)
    assert outcomes[0] == "cancelled" and set(outcomes[1:]) == {"done"}
    assert (losses(people.detail(job_id)), adapter_bytes(tmp_path / "adapter")) == undisturbed


def test_second_job_runs_beside_the_first_when_memory_allows_and_waits_when_not(
    cleanup: ExitStack, tmp_path: Path, job: Callable[..., JobSpec]
) -> None:
    coordinator = ThreadCoordinator(tmp_path / "state")
    cleanup.callback(coordinator.close)
    people = People(coordinator.endpoints.people_address)
    cleanup.callback(people.close)
    # Two workers with their baselines fit, a third does not; the process's own memory is what is really measured.
    agent = ThreadAgent(coordinator.endpoints.devices_address, "only", memory_bytes=100 << 30, baseline_bytes=40 << 30)
    cleanup.callback(agent.close)
    wait_until(lambda: people.devices(), "the agent attached")

    first = people.submit(job("first", stages=1, steps=3000))
    second = people.submit(job("second", stages=1, steps=3000))
    people.wait_for_step(first, 1)
    people.wait_for_step(second, 1)
    third = people.submit(job("third", stages=1))
    wait_until(lambda: "queued" in people.job(third).reason, "the third is queued")
    # Of another shape, so that the device would have to measure itself, and has no room for that either.
    fourth = people.submit(job("fourth", stages=1, micro_batch_size=1))
    wait_until(lambda: "waits until" in people.job(fourth).reason, "the fourth waits to be measured")

    people.stub.Cancel(cancel_request(first), timeout=10)
    for waiting in (third, fourth):
        assert people.wait(waiting).state == "succeeded", people.job(waiting)
    assert people.job(second).state == "running"
    people.stub.Cancel(cancel_request(second), timeout=10)
