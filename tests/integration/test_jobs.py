"""Whole jobs over real gRPC: partitions, losses, restarts, cancelling, queueing."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from coordinator.crash_points import CRASH_POINTS
from coordinator.jobs.lineage import LedgerRow, LedgerStatus, exactly_once_violations
from edge_node.engine.executor import StageExecutor, UnitInput
from edge_node.transport.base import UnitCancelledError
from plutino.assets import SNIPS_DIR, TINY_LLAMA_DIR
from plutino.data.batches import batch_indices
from plutino.job.spec import JobSpec
from plutino.types import Unit
from protos import jobs_pb2
from tests.integration.stack import (
    WAIT_S,
    People,
    ProcessCoordinator,
    ThreadAgent,
    ThreadCoordinator,
    losses,
    make_spec,
    wait_until,
)

NUM_ROWS = 40
STEPS = 8
BATCH = 4


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random 4-block llama with the tokenizer of the shipped model."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=4096,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        (folder / name).write_bytes((TINY_LLAMA_DIR / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "train.jsonl"
    lines = (SNIPS_DIR / "train.jsonl").read_text().splitlines()[:NUM_ROWS]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def cleanup() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def small_spec(model_dir: Path, rows_file: Path, output: Path, *, stages: int = 2, **training: object) -> JobSpec:
    settings = {"steps": STEPS, "batch_size": BATCH, "micro_batch_size": 2, "lr": 1e-2, "shadow_every": 2}
    return make_spec(
        model_dir,
        rows_file,
        output,
        data={"eval": str(rows_file), "eval_limit": 8},
        training={**settings, **training},
        placement={"stages": stages},
        method={"type": "lora", "rank": 4},
    )


@pytest.fixture
def job(model_dir: Path, rows_file: Path, tmp_path: Path) -> Callable[..., JobSpec]:
    def make(name: str = "adapter", **settings: object) -> JobSpec:
        return small_spec(model_dir, rows_file, tmp_path / name, **settings)

    return make


@pytest.fixture(scope="module")
def undisturbed(
    model_dir: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[float], bytes]:
    """Losses and adapter of a run to which nothing happens."""
    folder = tmp_path_factory.mktemp("calm")
    with ExitStack() as stack:
        people, _ = start(stack, folder / "state", 2)
        job_id = people.submit(small_spec(model_dir, rows_file, folder / "adapter", eval_every=4))
        assert people.wait(job_id).state == "succeeded", people.job(job_id)
        return losses(people.detail(job_id)), adapter_bytes(folder / "adapter")


def adapter_bytes(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def start(
    stack: ExitStack, state_dir: Path, num_agents: int, *, lease_s: float = 15.0
) -> tuple[People, list[ThreadAgent]]:
    coordinator = ThreadCoordinator(state_dir, lease_s=lease_s)
    stack.callback(coordinator.close)
    return attach(stack, coordinator.endpoints.devices_address, coordinator.endpoints.people_address, num_agents)


def attach(
    stack: ExitStack, devices_address: str, people_address: str, num_agents: int
) -> tuple[People, list[ThreadAgent]]:
    people = People(people_address)
    stack.callback(people.close)
    agents = [ThreadAgent(devices_address, f"device{i}") for i in range(num_agents)]
    for agent in agents:
        stack.callback(agent.close)
    wait_until(lambda: len(people.devices()) == num_agents, "all agents attached")
    return people, agents


def addresses_of(coordinator: ThreadCoordinator) -> tuple[str, str]:
    return coordinator.endpoints.devices_address, coordinator.endpoints.people_address


def lineage_rows(detail: dict[str, object]) -> list[LedgerRow]:
    return [
        LedgerRow(
            step=row["step"],
            plan_epoch=row["plan_epoch"],
            status=LedgerStatus(row["status"]),
            sample_indices=tuple(row["samples"]),
        )
        for row in detail["ledger"]  # type: ignore[attr-defined]
    ]


def expected_samples(steps: int = STEPS) -> list[int]:
    return [index for step in range(steps) for index in batch_indices(step, BATCH, NUM_ROWS, 0)]


@pytest.mark.parametrize(
    ("more_stages", "steps"), [pytest.param((3,), 5), pytest.param((2, 3, 4), 20, marks=pytest.mark.slow)]
)
def test_snips_on_one_to_four_workers_gives_bit_equal_losses_and_adapters(
    cleanup: ExitStack, tmp_path: Path, more_stages: tuple[int, ...], steps: int
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
    assert len(whole[0]) == steps and whole[0][-1] < 0.8 * whole[0][0]
    for stages in more_stages:
        assert run(stages) == whole


def test_worker_lost_in_training_job_returns_to_durable_step_and_ends_bit_equal(
    cleanup: ExitStack, tmp_path: Path, job: Callable[..., JobSpec], undisturbed: tuple[list[float], bytes]
) -> None:
    people, agents = start(cleanup, tmp_path / "state", 3)
    job_id = people.submit(job(eval_every=4))
    people.wait_for_step(job_id, 5)
    agent = next(agent for agent in agents if agent.sessions)
    agent.lose_worker(next(iter(agent.sessions)))

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
    wait_until(lambda: all(device["reserved_bytes"] == 0 for device in people.devices()), "memory freed", within_s=6)


def test_device_that_dies_together_with_the_coordinator_is_not_waited_for(
    cleanup: ExitStack, tmp_path: Path, job: Callable[..., JobSpec], undisturbed: tuple[list[float], bytes]
) -> None:
    coordinator = ThreadCoordinator(tmp_path / "state")
    cleanup.callback(lambda: coordinator.close())
    people, agents = attach(cleanup, *addresses_of(coordinator), 3)
    job_id = people.submit(job(eval_every=4))
    people.wait_for_step(job_id, 5)
    doomed = next(agent for agent in agents if agent.sessions)

    coordinator.close()
    doomed.close()
    coordinator = ThreadCoordinator(tmp_path / "state", lease_s=1.0)

    assert people.wait(job_id).state == "succeeded", people.job(job_id)
    detail = people.detail(job_id)
    assert detail["recoveries"] == 1
    assert (losses(detail), adapter_bytes(tmp_path / "adapter")) == undisturbed


def test_cancel_frees_workers_memory_and_queue(cleanup: ExitStack, tmp_path: Path, job: Callable[..., JobSpec]) -> None:
    people, agents = start(cleanup, tmp_path / "state", 2)
    job_id = people.submit(job(steps=5000))
    people.wait_for_step(job_id, 2)

    answer = people.stub.Cancel(pb_cancel(job_id), timeout=10)

    assert answer.state == "cancelled"
    wait_until(lambda: not any(agent.sessions for agent in agents), "workers ended", within_s=5)
    assert all(device["reserved_bytes"] == 0 for device in people.devices())
    assert not (tmp_path / "adapter").exists()


def test_paused_job_begins_no_step_and_resumed_ends_bit_equal(
    cleanup: ExitStack, tmp_path: Path, job: Callable[..., JobSpec], undisturbed: tuple[list[float], bytes]
) -> None:
    people, agents = start(cleanup, tmp_path / "state", 2)
    job_id = people.submit(job(eval_every=4))
    people.wait_for_step(job_id, 2)

    assert people.stub.Pause(jobs_pb2.PauseRequest(job_id=job_id), timeout=10).state == "paused"
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

    people.stub.Cancel(pb_cancel(first), timeout=10)
    assert people.wait(third).state == "succeeded"
    assert people.job(second).state == "running"
    people.stub.Cancel(pb_cancel(second), timeout=10)


def pb_cancel(job_id: str) -> jobs_pb2.CancelRequest:
    return jobs_pb2.CancelRequest(job_id=job_id)


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
    cleanup: ExitStack, tmp_path: Path, job: Callable[..., JobSpec], undisturbed: tuple[list[float], bytes]
) -> None:
    def lose_a_worker(people: People, agents: list[ThreadAgent]) -> None:
        (job_id,) = (summary.job_id for summary in people.stub.List(jobs_pb2.ListRequest(), timeout=WAIT_S).jobs)
        people.wait_for_step(job_id, 5)
        agents[1].lose_worker(next(iter(agents[1].sessions)))

    detail, state = crash_and_restart(cleanup, tmp_path, job(eval_every=4), "recovery_stored", lose_a_worker)

    assert state.startswith("succeeded"), state
    assert (losses(detail), adapter_bytes(tmp_path / "adapter")) == undisturbed
    assert detail["recoveries"] == 1, json.dumps(detail["transitions"], indent=1)
    assert any(row["status"] == "undone" for row in detail["ledger"])  # type: ignore[attr-defined]
    assert exactly_once_violations(lineage_rows(detail), expected_samples()) == ()
