"""What the workers of a job did in a step, recorded over real gRPC, and drawn beside its prediction."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from xml.etree import ElementTree

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from coordinator.artifacts.traces import PlannedEpoch
from coordinator.trace_command import draw_step
from partitioner.trace import StepTrace
from plutino.assets import SNIPS_DIR, TINY_LLAMA_DIR
from plutino.client import Client
from plutino.errors import UnknownJobError
from tests.integration.stack import People, ThreadAgent, ThreadCoordinator, make_spec, wait_until

NUM_MICRO_BATCHES = 3


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Client, str]]:
    """A client, and a job of two stages whose second one has two replicas, after its end."""
    folder = tmp_path_factory.mktemp("traces")
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
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        (folder / "model" / name).write_bytes((TINY_LLAMA_DIR / name).read_bytes())
    rows = folder / "rows.jsonl"
    rows.write_text("\n".join((SNIPS_DIR / "train.jsonl").read_text().splitlines()[:12]) + "\n")
    with ExitStack() as stack:
        coordinator = ThreadCoordinator(folder / "state")
        stack.callback(coordinator.close)
        people = People(coordinator.endpoints.people_address)
        stack.callback(people.close)
        for name in ("a", "b", "c"):
            agent = ThreadAgent(coordinator.endpoints.devices_address, name, host_id=name)
            stack.callback(agent.close)
        wait_until(lambda: len(people.devices()) == 3, "all agents attached")
        spec = make_spec(
            folder / "model",
            rows,
            folder / "out",
            method={"type": "lora", "rank": 2, "target_modules": ["q_proj"]},
            training={"steps": 4, "batch_size": NUM_MICRO_BATCHES, "micro_batch_size": 1, "shadow_every": 1000},
            placement={"stages": 2},
        )
        job_id = people.submit(spec)
        assert people.wait(job_id).state == "succeeded", people.job(job_id)
        client = Client(coordinator.endpoints.people_address)
        stack.callback(client.close)
        yield client, job_id


def test_third_step_of_a_job_is_recorded_on_every_worker_with_every_pass(ended: tuple[Client, str]) -> None:
    client, job_id = ended

    trace = StepTrace.model_validate_json(client.trace(job_id)[0])

    assert (trace.step, trace.plan_epoch, len(trace.workers)) == (2, 1, 3)
    measured = trace.on_one_clock()
    passes = sorted((name[0], is_forward, m) for name, is_forward, m in measured.durations())
    assert passes == sorted((k, way, m) for k in (0, 1) for way in (True, False) for m in range(NUM_MICRO_BATCHES))
    replicated = max(worker.stage for worker in trace.workers if worker.replica == 1)
    for worker in trace.workers:
        kinds = [span.kind for span in worker.spans]
        # Only replicas of a stage hold the same parameters here.
        assert (kinds.count("update"), kinds.count("sum")) == (1, int(worker.stage == replicated))
        assert kinds[-2:] == ["wait", "update"]
        ends = [span.end_s for span in worker.spans]
        assert ends == sorted(ends)


def test_recorded_step_is_drawn_beside_its_prediction_as_text_and_as_a_picture(ended: tuple[Client, str]) -> None:
    client, job_id = ended
    trace_json, planned_json = client.trace(job_id, 2)
    trace, planned = StepTrace.model_validate_json(trace_json), PlannedEpoch.model_validate_json(planned_json)

    text = draw_step(trace, planned, as_picture=False)
    picture = draw_step(trace, planned, as_picture=True)

    assert f"predicted {planned.plan.step_s:.4g} s" in text and "step 2 as it was" in text
    assert len([e for e in ElementTree.fromstring(picture).iter() if (e.text or "").startswith("forward ")]) == 6 * 3


def test_step_whose_plan_was_not_kept_is_drawn_alone_and_says_why(ended: tuple[Client, str]) -> None:
    client, job_id = ended
    trace = StepTrace.model_validate_json(client.trace(job_id)[0])

    assert "its plan was not kept" in draw_step(trace, None, as_picture=False)
    ElementTree.fromstring(draw_step(trace, None, as_picture=True))


def test_step_that_was_not_recorded_is_refused_with_those_that_were(ended: tuple[Client, str]) -> None:
    client, job_id = ended

    with pytest.raises(UnknownJobError, match="recorded are: 2"):
        client.trace(job_id, 1)
    assert json.loads(client.trace(job_id)[0])["step"] == 2
