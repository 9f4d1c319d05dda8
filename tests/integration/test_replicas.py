"""Stages on several devices, over real gRPC: the same bits as without, whatever is lost on the way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from edge_node.engine import shared_gradients
from partitioner.plan import Plan
from plutino.assets import SNIPS_DIR, TINY_LLAMA_DIR
from plutino.job.spec import JobSpec
from plutino.types import WorkerRef
from protos import jobs_pb2
from tests.integration.stack import (
    TIMINGS,
    WAIT_S,
    People,
    ThreadAgent,
    ThreadCoordinator,
    losses,
    make_spec,
    wait_until,
)

STEPS = 20
NUM_ROWS = 48


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random 2-block llama whose embedding is its head, with the tokenizer of the shipped model."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
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
    path.write_text("\n".join((SNIPS_DIR / "train.jsonl").read_text().splitlines()[:NUM_ROWS]) + "\n")
    return path


class Fleet:
    """A coordinator and devices that are hosts of their own, so that replicas pay."""

    def __init__(self, stack: ExitStack, state_dir: Path, speeds: dict[str, float]) -> None:
        coordinator = ThreadCoordinator(state_dir)
        stack.callback(coordinator.close)
        self.people = People(coordinator.endpoints.people_address)
        stack.callback(self.people.close)
        self.agents = {name: self._agent(coordinator, name, speed) for name, speed in speeds.items()}
        for agent in self.agents.values():
            stack.callback(agent.close)
        wait_until(lambda: len(self.people.devices()) == len(speeds), "all agents attached")

    @staticmethod
    def _agent(coordinator: ThreadCoordinator, name: str, speed: float) -> ThreadAgent:
        timings = TIMINGS.times(1 / speed)
        return ThreadAgent(coordinator.endpoints.devices_address, name, host_id=name, timings=timings)

    def finish(self, spec: JobSpec) -> tuple[list[float], dict[str, bytes], dict[str, Any]]:
        """Submit and wait; gives losses, files that carry numbers, and the detail."""
        job_id = self.people.submit(spec)
        return self.result(job_id, spec)

    def result(self, job_id: str, spec: JobSpec) -> tuple[list[float], dict[str, bytes], dict[str, Any]]:
        assert self.people.wait(job_id).state == "succeeded", self.people.job(job_id)
        detail = self.people.detail(job_id)
        adapter = (Path(str(spec.output.dir)) / "adapter_model.safetensors").read_bytes()
        return losses(detail), {"adapter": adapter}, detail

    def worker(self, job_id: str, *, replica_index: int) -> tuple[WorkerRef, ThreadAgent]:
        """Some worker of a job that is such a replica, and its device."""
        return next(
            (ref, agent)
            for agent in self.agents.values()
            for ref in list(agent.sessions)
            if (ref.job_id, ref.replica_index) == (job_id, replica_index)
        )

    def plan(self, job_id: str) -> Plan:
        return Plan.model_validate(self.people.detail(job_id)["plan"])


def spec_for(
    model_dir: Path, rows_file: Path, output: Path, devices: list[str], stages: int, **training: Any
) -> JobSpec:
    return make_spec(
        model_dir,
        rows_file,
        output,
        data={"eval": str(rows_file), "eval_limit": 5},
        scoring={"max_new_tokens": 4, "batch_rows": 3, "before": False},
        method={"type": "lora", "rank": 4, "dropout": 0.1, "target_modules": ["q_proj", "v_proj"]},
        training={
            "steps": STEPS,
            "batch_size": 7,
            "micro_batch_size": 1,
            "lr": 1e-2,
            "eval_every": 10,
            "shadow_every": 4,
            **training,
        },
        placement={"devices": devices, "stages": stages},
    )


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with ExitStack() as stack:
        yield Fleet(stack, tmp_path_factory.mktemp("fleet"), {"a": 2.0, "b": 2.0, "c": 2.0, "slow": 1.0})


@pytest.fixture(scope="module")
def alone(fleet: Fleet, model_dir: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    """Losses, adapter and scores of a run on one device."""
    return told(fleet.finish(spec_for(model_dir, rows_file, tmp_path_factory.mktemp("alone") / "adapter", ["a"], 1)))


def told(run: tuple[list[float], dict[str, bytes], dict[str, Any]]) -> tuple[Any, ...]:
    """What must not depend on who computed it."""
    of_losses, files, detail = run
    assert len(of_losses) == STEPS
    return of_losses, files, detail["evaluations"], detail["scores"]


@pytest.mark.parametrize(
    "names",
    [pytest.param([*names], marks=pytest.mark.slow) for names in (["a", "b"], ["a", "b", "c", "slow"])],
    ids=["two", "four"],
)
def test_one_stage_on_several_devices_gives_the_bits_of_one(
    fleet: Fleet, tmp_path: Path, model_dir: Path, rows_file: Path, alone: tuple[Any, ...], names: list[str]
) -> None:
    run = fleet.finish(spec_for(model_dir, rows_file, tmp_path / "adapter", names, 1))

    assert told(run) == alone
    plan = Plan.model_validate(run[2]["plan"])
    assert [sorted(stage.device_names) for stage in plan.stages] == [names]


@pytest.mark.slow
def test_replicas_of_a_job_with_free_numerics_hand_over_sums_and_stay_near_one_device(
    fleet: Fleet, tmp_path: Path, model_dir: Path, rows_file: Path, alone: tuple[Any, ...]
) -> None:
    spec = spec_for(model_dir, rows_file, tmp_path / "adapter", ["a", "b", "slow"], 1)
    free = spec.model_copy(update={"placement": spec.placement.model_copy(update={"numerics": "free"})})

    of_losses, _, detail = fleet.finish(free)

    assert Plan.model_validate(detail["plan"]).has_replicas
    # The same numbers added in another order.
    assert of_losses == pytest.approx(alone[0], abs=1e-5)


@pytest.mark.slow
def test_replicas_whose_sums_travel_in_fp16_give_the_bits_of_one_device_that_rounds_them(
    fleet: Fleet, tmp_path: Path, model_dir: Path, rows_file: Path, alone: tuple[Any, ...]
) -> None:
    runs = []
    for name, devices, stages in (("alone", ["a"], 1), ("fleet", [], 2)):
        spec = spec_for(model_dir, rows_file, tmp_path / name, devices, stages)
        placement = spec.placement.model_copy(update={"sums": "fp16"})
        runs.append(fleet.finish(spec.model_copy(update={"placement": placement})))

    assert told(runs[1]) == told(runs[0])
    assert told(runs[0])[:2] != alone[:2]
    assert Plan.model_validate(runs[1][2]["plan"]).has_replicas
    assert [run[2]["numerics"]["sums"] for run in runs] == ["fp16", "fp16"]


def test_two_stages_of_unequal_replicas_one_lost_and_a_pause_give_the_bits_of_one_device(
    fleet: Fleet,
    tmp_path: Path,
    model_dir: Path,
    rows_file: Path,
    alone: tuple[Any, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A message for each parameter: many on their way at once.
    monkeypatch.setattr(shared_gradients, "MAX_GROUP_BYTES", 1)
    spec = spec_for(model_dir, rows_file, tmp_path / "adapter", [], 2)

    job_id = fleet.people.submit(spec)
    fleet.people.wait_for_step(job_id, 6)
    plan = fleet.plan(job_id)
    assert [len(stage.replicas) for stage in plan.stages] == [2, 2]
    assert sorted(sorted(owners.count(r) for r in (0, 1)) for owners in plan.micro_batch_owners) == [[2, 5], [3, 4]]
    assert fleet.people.stub.Pause(jobs_pb2.PauseRequest(job_id=job_id), timeout=10).state == "paused"
    assert fleet.people.stub.Resume(jobs_pb2.ResumeRequest(job_id=job_id), timeout=10).state == "running"
    ref, agent = fleet.worker(job_id, replica_index=1)
    agent.lose_worker(ref)

    run = fleet.result(job_id, spec)
    assert told(run) == alone
    assert run[2]["recoveries"] == 1


def test_cancel_of_a_job_with_replicas_frees_all_its_devices(
    fleet: Fleet, tmp_path: Path, model_dir: Path, rows_file: Path
) -> None:
    job_id = fleet.people.submit(spec_for(model_dir, rows_file, tmp_path / "adapter", ["a", "b"], 1, steps=5000))
    fleet.people.wait_for_step(job_id, 2)
    assert fleet.plan(job_id).has_replicas

    fleet.people.stub.Cancel(jobs_pb2.CancelRequest(job_id=job_id), timeout=10)

    wait_until(lambda: not any(a.sessions for a in fleet.agents.values()), "workers ended", within_s=5)
    assert all(device["reserved_bytes"] == 0 for device in fleet.people.devices())


def test_job_that_forbids_replicas_leaves_devices_unused(
    fleet: Fleet, tmp_path: Path, model_dir: Path, rows_file: Path
) -> None:
    spec = spec_for(model_dir, rows_file, tmp_path / "adapter", ["a", "b"], 1)
    never = spec.model_copy(update={"placement": spec.placement.model_copy(update={"replicas": "never"})})
    request = jobs_pb2.PlanRequest(spec_json=never.model_dump_json())

    plan = Plan.model_validate_json(fleet.people.stub.Plan(request, timeout=WAIT_S).plan_json)

    assert [stage.device_names for stage in plan.stages] in ([("a",)], [("b",)])
