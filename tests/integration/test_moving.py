"""A running job moves to another plan, over real gRPC: at a commit, with nothing undone and the same bits."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from coordinator.jobs.moving import Replanner
from edge_node.engine.executor import StageExecutor
from edge_node.engine.unit import StepOutcome, UnitInput
from partitioner.device import BlockTimings
from partitioner.plan import Plan
from plutino.assets import SNIPS_DIR, TINY_LLAMA_DIR
from plutino.job.spec import JobSpec
from tests.integration.stack import WAIT_S, People, ThreadAgent, ThreadCoordinator, losses, make_spec, wait_until

STEPS = 30
SLOW_FROM = 12
"""By then the job's usual pace is known."""
HELD_AT = 20
"""A step that waits until the coordinator has priced another plan, however fast the steps are here."""
# Long steps, so that the few that are left are worth a move; nothing really takes so long.
TIMINGS = BlockTimings(forward_s=10.0, backward_s=20.0, embedding_s=0.1, head_forward_s=0.1, head_backward_s=0.1)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
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
    path.write_text("\n".join((SNIPS_DIR / "train.jsonl").read_text().splitlines()[:20]) + "\n")
    return path


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as exit_stack:
        yield exit_stack


class Fleet:
    """A coordinator, devices, and what their workers say of their own pace."""

    def __init__(self, stack: ExitStack, state_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.coordinator = ThreadCoordinator(state_dir)
        stack.callback(self.coordinator.close)
        self.people = People(self.coordinator.endpoints.people_address)
        stack.callback(self.people.close)
        self._stack = stack
        self.agents: list[ThreadAgent] = []
        self.factors: dict[str, float] = {}
        """Devices that are slower than planned, from step SLOW_FROM on."""
        self.at_step: dict[int, Callable[[], None]] = {}
        self.priced = threading.Event()
        self._speak_for_workers(monkeypatch)

    def join(self, *names: str) -> None:
        for name in names:
            address = self.coordinator.endpoints.devices_address
            self.agents.append(ThreadAgent(address, name, host_id=name, timings=TIMINGS))
            self._stack.callback(self.agents[-1].close)
        wait_until(lambda: len(self.people.devices()) == len(self.agents), "all agents attached")

    def device_of(self, executor: StageExecutor) -> str:
        workers = ((agent.name, session) for agent in self.agents for session in list(agent.sessions.values()))
        return next(name for name, session in workers if session._executor is executor)

    def _speak_for_workers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        train_step, on_considered = StageExecutor.train_step, Replanner._on_considered

        def timed(executor: StageExecutor, work: UnitInput) -> StepOutcome:
            outcome, step = train_step(executor, work), work.unit.serial
            shape = executor.stages[executor.me.stage_index]
            block_s = TIMINGS.forward_s + TIMINGS.backward_s
            factor = self.factors.get(self.device_of(executor), 1.0) if step >= SLOW_FROM else 1.0
            outcome.times.compute_s = work.num_micro_batches * (shape.end_block - shape.start_block) * block_s * factor
            if executor.me.stage_index == 0 and (act := self.at_step.pop(step, None)) is not None:
                act()
            return outcome

        def considered(replanner: Replanner, task: Any) -> None:
            on_considered(replanner, task)
            self.priced.set()

        monkeypatch.setattr(StageExecutor, "train_step", timed)
        monkeypatch.setattr(Replanner, "_on_considered", considered)

    def wait_for_price(self) -> None:
        assert self.priced.wait(WAIT_S), "no other plan was looked for"

    def finish(self, job_id: str, spec: JobSpec) -> tuple[list[float], bytes]:
        assert self.people.wait(job_id).state == "succeeded", self.people.job(job_id)
        adapter = (Path(str(spec.output.dir)) / "adapter_model.safetensors").read_bytes()
        return losses(self.people.detail(job_id)), adapter

    def plans(self, job_id: str) -> list[Plan]:
        return [
            Plan.model_validate_json(e["plan_json"]) for kind, e in self.people.events(job_id) if kind == "PlanMade"
        ]


def spec_for(
    model_dir: Path, rows_file: Path, output: Path, *, stages: int | None, replan: str = "auto", codec: str = "raw"
) -> JobSpec:
    return make_spec(
        model_dir,
        rows_file,
        output,
        method={"type": "lora", "rank": 4, "target_modules": ["q_proj"], "dropout": 0.1},
        training={"steps": STEPS, "batch_size": 4, "micro_batch_size": 2, "lr": 1e-2, "shadow_every": 1000},
        placement={"stages": stages, "replicas": "never", "replan": replan, "codec": codec},
    )


def test_device_that_becomes_ten_times_slower_loses_its_blocks_at_a_commit_and_no_bit_changes(
    stack: ExitStack, tmp_path: Path, model_dir: Path, rows_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = Fleet(stack, tmp_path / "state", monkeypatch)
    fleet.join("a", "b", "c")
    calm = spec_for(model_dir, rows_file, tmp_path / "calm", stages=2, replan="never")
    calm_id = fleet.people.submit(calm)
    undisturbed = fleet.finish(calm_id, calm)

    spec = spec_for(model_dir, rows_file, tmp_path / "adapter", stages=2)
    slow = fleet.plans(calm_id)[0].stages[1].device_names[0]
    fleet.factors[slow] = 10.0
    fleet.at_step[HELD_AT] = fleet.wait_for_price
    job_id = fleet.people.submit(spec)

    assert fleet.finish(job_id, spec) == undisturbed
    before, after = fleet.plans(job_id)
    (moved,) = [event for kind, event in fleet.people.events(job_id) if kind == "PlanChanges"]
    detail = fleet.people.detail(job_id)
    assert before.stages[1].device_names == (slow,)
    assert slow not in [name for stage in after.stages for name in stage.device_names]
    assert after.step_s == pytest.approx(before.step_s)
    assert f"from {slow} to" in moved["reason"] and f"{slow} takes 10 times as long" in moved["reason"]
    assert SLOW_FROM < moved["step"] <= HELD_AT + 1
    assert detail["recoveries"] == 0 and all(row["status"] == "committed" for row in detail["ledger"])


@pytest.mark.slow
def test_job_in_bf16_that_moves_to_another_cut_still_rounds_where_its_first_plan_did(
    stack: ExitStack, tmp_path: Path, model_dir: Path, rows_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = Fleet(stack, tmp_path / "state", monkeypatch)
    fleet.join("a", "b")
    calm = spec_for(model_dir, rows_file, tmp_path / "calm", stages=2, replan="never", codec="bf16")
    calm_id = fleet.people.submit(calm)
    undisturbed = fleet.finish(calm_id, calm)

    spec = spec_for(model_dir, rows_file, tmp_path / "adapter", stages=2, codec="bf16")
    fleet.factors["b"] = 10.0
    fleet.at_step[HELD_AT] = fleet.wait_for_price
    job_id = fleet.people.submit(spec)

    assert fleet.finish(job_id, spec) == undisturbed
    before, after = fleet.plans(job_id)
    (border,) = before.bf16_borders
    assert border not in [stage.end_block for stage in after.stages[:-1]]
    assert fleet.people.detail(job_id)["numerics"]["bf16_borders"] == [border]


@pytest.mark.slow
def test_device_that_joins_takes_over_blocks_where_that_pays(
    stack: ExitStack, tmp_path: Path, model_dir: Path, rows_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = Fleet(stack, tmp_path / "state", monkeypatch)
    fleet.join("a")

    fleet.at_step[2] = lambda: fleet.join("b")
    # The commit of step 2 sees it; step 3 may be on its way by then.
    fleet.at_step[4] = fleet.wait_for_price
    spec = spec_for(model_dir, rows_file, tmp_path / "adapter", stages=None)
    job_id = fleet.people.submit(spec)

    fleet.finish(job_id, spec)
    before, after = fleet.plans(job_id)
    assert (len(before.stages), len(after.stages)) == (1, 2)
    assert any(kind == "PlanChanges" and "b joined" in event["reason"] for kind, event in fleet.people.events(job_id))
