"""A whole job on quantised weights over real gRPC: plan, numerics record, packed cache, export."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from plutino.assets import SNIPS_DIR, TINY_LLAMA_DIR
from protos import jobs_pb2
from tests.integration.stack import People, ThreadAgent, ThreadCoordinator, losses, make_spec, wait_until

STEPS = 3


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Iterator[People]:
    folder = tmp_path_factory.mktemp("stack")
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        coordinator = ThreadCoordinator(folder / "state")
        stack.callback(coordinator.close)
        people = People(coordinator.endpoints.people_address)
        stack.callback(people.close)
        for index in range(2):
            agent = ThreadAgent(coordinator.endpoints.devices_address, f"device{index}")
            stack.callback(agent.close)
        wait_until(lambda: len(people.devices()) == 2, "both agents attached")
        yield people


LORA = {"type": "lora", "rank": 4}
BESIDE = {"type": "parallel_adapters", "reduction": 4}


def submit(
    people: People,
    tmp_path: Path,
    *,
    stages: int,
    quantization: str,
    steps: int = STEPS,
    method: dict[str, Any] = LORA,
) -> str:
    spec = make_spec(
        TINY_LLAMA_DIR,
        SNIPS_DIR / "train.jsonl",
        tmp_path / f"adapter{stages}",
        training={"steps": steps, "batch_size": 4, "micro_batch_size": 2, "lr": 2e-3},
        placement={"stages": stages},
        method=method,
    )
    spec = spec.model_copy(
        update={"model": spec.model.model_copy(update={"quantization": quantization, "quantize_head": "int8"})}
    )
    return people.submit(spec)


def run(people: People, tmp_path: Path, **settings: Any) -> str:
    job_id = submit(people, tmp_path, **settings)
    assert people.wait(job_id).state == "succeeded", people.job(job_id)
    return job_id


def test_nf4_job_gives_the_same_bits_on_one_and_two_workers_and_the_second_job_reads_no_linear(people, tmp_path):
    two, one = (run(people, tmp_path, stages=stages, quantization="nf4") for stages in (2, 1))

    details = [people.detail(job_id) for job_id in (two, one)]
    assert losses(details[0]) == losses(details[1])
    adapters = [(tmp_path / f"adapter{n}" / "adapter_model.safetensors").read_bytes() for n in (1, 2)]
    assert adapters[0] == adapters[1]
    first, second = ([values for kind, values in people.events(job_id)] for job_id in (two, one))
    read = [sum(values.get("bytes_read", 0) for values in events) for events in (first, second)]
    assert read[1] < read[0] / 2
    plan = json.loads(next(values["plan_json"] for values in first if "plan_json" in values))
    assert plan["packing"] == {
        "scheme": "nf4",
        "embedding": "keep",
        "head": "int8",
        "products": "dequantised",
    }
    assert 0 < plan["unpacked_share"] < 0.4
    card = (tmp_path / "adapter1" / "README.md").read_text()
    assert "whose base was held in nf4: not comparable" in card
    assert "head in int8" in card


def test_int8_job_beside_the_blocks_measures_how_to_multiply_and_keeps_the_answer_in_its_record(people, tmp_path):
    job_id = run(people, tmp_path, stages=2, quantization="int8", steps=2, method=BESIDE)

    plan = json.loads(
        next(values["plan_json"] for kind, values in people.events(job_id) if values and "plan_json" in values)
    )
    assert "times the rate of dequantised weights on these devices" in plan["packing_why"]
    is_faster = "integer products, because" in plan["packing_why"]
    products = people.detail(job_id)["numerics"]["packing"]["products"]
    assert products == plan["packing"]["products"] == ("integer" if is_faster else "dequantised")


def test_auto_on_roomy_devices_quantises_nothing_and_says_so(people, tmp_path):
    job_id = submit(people, tmp_path, stages=1, quantization="auto", steps=1000)
    people.wait_for_step(job_id, 1)

    detail = people.detail(job_id)

    people.stub.Cancel(jobs_pb2.CancelRequest(job_id=job_id), timeout=10)
    assert detail["numerics"]["packing"]["scheme"] == "none"
