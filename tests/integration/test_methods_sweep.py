"""A sweep over real gRPC: its trials are ordinary jobs on stages that stay loaded, and it survives a restart."""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack

import pytest
import torch
from safetensors.numpy import load_file
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from coordinator import cli
from coordinator.sweeps.grid import expand
from plutino.assets import SNIPS_DIR, TINY_LLAMA_DIR
from plutino.client import Client
from plutino.events import PlanMade, WorkerLoaded
from plutino.sweep import Halving, SweepSpec
from tests.integration.stack import People, ThreadAgent, ThreadCoordinator, losses, wait_until

JOB = f"""
name: compare
model: {{path: MODEL, dtype: fp32}}
data: {{train: {SNIPS_DIR / "train.jsonl"}, eval: {SNIPS_DIR / "validation.jsonl"}, limit: 16, eval_limit: 4}}
scoring: {{metric: exact_match, max_new_tokens: 2}}
training: {{steps: 4, batch_size: 4, micro_batch_size: 2, lr: 2e-3, checkpointing: "off"}}
placement: {{stages: 2, threads: 1}}
"""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """Random weights a hundred times smaller than the bundled model's, with its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    config = json.loads((TINY_LLAMA_DIR / "config.json").read_text())
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**config, **sizes, "num_hidden_layers": 2, "head_dim": 8}))
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TINY_LLAMA_DIR / name, folder)
    return folder


@pytest.fixture
def stack(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with ExitStack() as stack:
        yield stack


def start(stack, state_dir):
    coordinator = ThreadCoordinator(state_dir)
    people = People(coordinator.endpoints.people_address)
    client = Client(coordinator.endpoints.people_address)
    return coordinator, people, client


def agents_of(stack, coordinator, people):
    agents = [ThreadAgent(coordinator.endpoints.devices_address, f"device{index}") for index in range(2)]
    for agent in agents:
        stack.callback(agent.close)
    wait_until(lambda: len(people.devices()) == 2, "both agents attached")
    return agents


def sweep_of(tmp_path, model_dir, settings, **changes):
    path = tmp_path / "job.yaml"
    path.write_text(JOB.replace("MODEL", str(model_dir)))
    return SweepSpec(name="compare", trials=expand(path, settings), **changes)


def ended(client, sweep_id):
    return wait_until(lambda: (s := client.sweeps.status(sweep_id)).has_ended and s, f"the end of {sweep_id}")


def test_trials_load_their_stages_once_and_have_the_bits_of_jobs_of_their_own(stack, tmp_path, model_dir):
    coordinator, people, client = start(stack, tmp_path / "state")
    stack.callback(coordinator.close)
    stack.callback(people.close)
    stack.callback(client.close)
    agents_of(stack, coordinator, people)
    spec = sweep_of(
        tmp_path, model_dir, ["method=lora,prompt,adapters", "method.rank=4,8", "method.num_virtual_tokens=3"]
    )

    sweep_id = client.sweeps.submit(spec, idempotency_key="once")
    assert client.sweeps.submit(spec, idempotency_key="once") == sweep_id
    status = ended(client, sweep_id)

    assert status.state == "succeeded", status
    assert [result.state for result in status.results] == ["succeeded"] * 4
    assert all(result.score is not None and result.eval_loss > 0 for result in status.results)
    assert all(result.peak_bytes > 0 and result.train_s > 0 for result in status.results)
    assert [result.trained_params for result in status.results][1] == 2 * status.results[0].trained_params
    assert status.base_score is not None
    events = {r.job_id: [n.event for n in client.watch(r.job_id)] for r in status.results}
    read = {j: sum(e.tensors_read for e in found if isinstance(e, WorkerLoaded)) for j, found in events.items()}
    first, *others = [result.job_id for result in status.results]
    assert read[first] > 0 and [read[job_id] for job_id in others] == [0, 0, 0]
    plans = {e.plan_json for found in events.values() for e in found if isinstance(e, PlanMade)}
    assert len(plans) == 1
    assert [j for j in events if "before" in people.detail(j)["scores"]] == [first]

    attach = ["sweep", sweep_id[:-2], "--state-dir", str(tmp_path / "state")]
    told = json.loads(CliRunner().invoke(cli.app, [*attach, "--json"]).stdout)
    assert told["recommendation"] == status.recommendation.model_dump() and len(told["results"]) == 4
    table = CliRunner().invoke(cli.app, attach).stdout
    assert f"take trial {status.recommendation.trial + 1}" in table and "type lora, rank 8" in table

    # The same job, handed in by itself, loads its own stages.
    alone = spec.trials[2].spec
    job_id = people.submit(alone)
    assert people.wait(job_id).state == "succeeded"
    assert losses(people.detail(job_id)) == losses(people.detail(status.results[2].job_id))
    assert people.detail(job_id)["scores"]["after"] == people.detail(status.results[2].job_id)["scores"]["after"]
    chosen = status.results[status.recommendation.trial]
    assert losses(people.detail(status.adapter_job_id)) == losses(people.detail(chosen.job_id))
    assert load_file(f"{status.adapter_dir}/adapter_model.safetensors")


def test_sweep_with_halving_goes_on_after_a_restart_and_repeats_no_job(stack, tmp_path, model_dir):
    coordinator, people, client = start(stack, tmp_path / "state")
    agents_of(stack, coordinator, people)
    spec = sweep_of(tmp_path, model_dir, ["method.rank=1,2,4"], halving=Halving(eta=3, min_steps=1))
    sweep_id = client.sweeps.submit(spec)
    wait_until(lambda: client.sweeps.status(sweep_id).results[0].state == "succeeded", "the first trial")
    people.close()
    client.close()
    coordinator.close()

    coordinator, people, client = start(stack, tmp_path / "state")
    stack.callback(coordinator.close)
    stack.callback(people.close)
    stack.callback(client.close)
    status = ended(client, sweep_id)

    assert status.state == "succeeded", status
    assert sorted(result.state for result in status.results) == ["dropped", "dropped", "succeeded"]
    assert sorted((result.rung, result.steps) for result in status.results) == [(0, 1), (0, 1), (1, 4)]
    jobs = [job.name for job in client.jobs()]
    # Three short trials, the promoted one in full, and once more to publish it.
    assert len(jobs) == 5
    assert status.recommendation.trial == next(r.trial for r in status.results if r.rung == 1)


def test_trial_that_a_restart_interrupts_goes_on_as_a_trial_whose_stages_the_next_one_finds(
    stack, tmp_path, model_dir, gate
):
    gate.hold_at(2)
    coordinator, people, client = start(stack, tmp_path / "state")
    agents = agents_of(stack, coordinator, people)
    spec = sweep_of(tmp_path, model_dir, ["method.rank=1,2"])
    sweep_id = client.sweeps.submit(spec)
    wait_until(lambda: client.sweeps.status(sweep_id).results[0].steps == 2, "the middle of the first trial")
    num_profiles = [agent.num_profiles for agent in agents]
    people.close()
    client.close()
    coordinator.close()

    coordinator, people, client = start(stack, tmp_path / "state")
    stack.callback(coordinator.close)
    stack.callback(people.close)
    stack.callback(client.close)
    gate.open()
    status = ended(client, sweep_id)

    assert status.state == "succeeded", status
    first, second = (result.job_id for result in status.results)
    assert len(client.jobs()) == 3
    # Measuring anew needs the memory of held stages.
    assert [agent.num_profiles for agent in agents] == num_profiles and sum(num_profiles) > 0
    # Ended by command, a process would take its stage with it.
    assert [ref for agent in agents for ref in agent.stopped if ref.job_id == first] == []
    loaded = [note.event for note in client.watch(second) if isinstance(note.event, WorkerLoaded)]
    assert loaded and sum(event.tensors_read for event in loaded) == 0
    assert len(losses(people.detail(first))) == 4


def test_cancelled_sweep_ends_its_job_and_keeps_what_was_measured(stack, tmp_path, model_dir):
    coordinator, people, client = start(stack, tmp_path / "state")
    stack.callback(coordinator.close)
    stack.callback(people.close)
    stack.callback(client.close)
    agents_of(stack, coordinator, people)
    spec = sweep_of(tmp_path, model_dir, ["method.rank=1,2,4", "training.steps=200"])
    sweep_id = client.sweeps.submit(spec)
    wait_until(lambda: client.sweeps.status(sweep_id).results[0].steps, "a step of the first trial")
    status = client.sweeps.cancel(sweep_id)
    assert status.state == "cancelled" and status.results[0].state == "cancelled"
    assert {result.state for result in status.results[1:]} == {"waiting"}
    assert [job.state for job in client.jobs()] == ["cancelled"]
