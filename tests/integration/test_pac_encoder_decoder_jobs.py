"""T5 and the activation cache over real gRPC: a side network's epochs, a device that joins them, a frozen prefix."""

from __future__ import annotations

import json
import threading
from dataclasses import replace

import pytest

from coordinator.jobs.moving import Replanner
from partitioner.device import BlockTimings
from plutino.job.spec import parse_spec
from tests.integration.stack import WAIT_S, People, ThreadAgent, ThreadCoordinator, wait_until
from tests.integration.test_encoder_jobs import WORDS, save_folder
from tests.integration.test_pac_phases import finished, fleet, weights_of

NUM_ROWS = 8
# So long that the few steps of a test are worth a move; nothing really takes so long.
TIMINGS = BlockTimings(forward_s=10.0, backward_s=20.0, embedding_s=0.1, head_forward_s=0.1, head_backward_s=0.1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model and its rows, sources and targets of several lengths."""
    folder = tmp_path_factory.mktemp("t5")
    save_folder("t5", folder / "model")
    rows = [
        {
            "prompt": " ".join(WORDS[(row * 3 + word) % len(WORDS)] for word in range(3 + row % 5)),
            "completion": " ".join(WORDS[(row + word) % len(WORDS)] for word in range(1 + row % 3)),
        }
        for row in range(NUM_ROWS)
    ]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


SIDE = {"type": "parallel_adapters", "reduction": 2}


def spec_of(folder, output, *, stages, epochs=3, replan="never", method=SIDE):
    values = {
        "model": {"path": str(folder / "model"), "dtype": "fp32"},
        "objective": {"type": "seq2seq"},
        "method": method,
        "data": {"train": str(folder / "train.jsonl"), "max_tokens": 16},
        "training": {
            "epochs": epochs,
            "batch_size": 4,
            "micro_batch_size": 2,
            "lr": 2e-3,
            "activation_cache": "raw",
        },
        "placement": {"stages": stages, "cached_epochs": "data-parallel", "replicas": "never", "replan": replan},
        "output": {"dir": str(output)},
    }
    return parse_spec(values, base_dir=output.parent)


def uncached(folder, tmp_path, **settings):
    """Losses and adapter of the job on one device that keeps nothing."""
    with fleet(tmp_path / "alone", 1, num_bytes=0) as (people, _):
        spec = spec_of(folder, tmp_path / "alone" / "adapter", stages=1, **settings)
        found = finished(people, people.submit(spec), tmp_path / "alone" / "adapter")
        assert not found[2]
        return found[:2]


def phases_of(agents):
    """Plan epoch, whether its steps come from the cache, and whose; in order."""
    plans = {}
    for agent in agents:
        for assignment in agent.assignments:
            plans.setdefault((assignment.plan_epoch, assignment.from_cache), set()).add(agent.name)
    return [(from_cache, sorted(names)) for (_, from_cache), names in sorted(plans.items())]


def test_t5_leaves_the_pipeline_for_cached_epochs_on_two_devices_with_the_bits_of_an_uncached_job(folder, tmp_path):
    with fleet(tmp_path / "fleet", 2) as (people, agents):
        output = tmp_path / "fleet" / "adapter"
        found = finished(people, people.submit(spec_of(folder, output, stages=2)), output)
        phases = phases_of(agents)

    assert found[:2] == uncached(folder, tmp_path)
    assert [step for step, _ in found[2]] == [2, 6]
    assert "backbone leaves their memory" in found[2][0][1]
    both = ["device0", "device1"]
    assert phases == [(False, both), (True, both), (False, both)]


def test_t5_with_lora_in_its_last_block_reads_the_encoders_output_and_what_the_block_gets_in_later_epochs(
    folder, tmp_path
):
    lora = {"type": "lora", "rank": 4, "dropout": 0.1, "blocks": "last 1"}
    with fleet(tmp_path, 2) as (people, agents):
        runs = []
        for number in range(2):
            spec = spec_of(folder, tmp_path / f"adapter{number}", stages=2, epochs=2, method=lora)
            job_id = people.submit(spec)
            runs.append(finished(people, job_id, tmp_path / f"adapter{number}"))
            if number == 0:
                upper = people.detail(job_id)["plan"]["upper"]
                steps = [event for kind, event in people.events(job_id) if kind == "StepCommitted"]
            for agent in agents:
                agent._weights = replace(agent._weights, activation_bytes=0)

    assert runs[0] == runs[1]
    assert (upper["place"], upper["keeps_source"]) == (3, True)
    assert sorted(worker["cached_rows"] for worker in steps[-1]["workers"]) == [0, NUM_ROWS]
    kept = {path.name for path in tmp_path.rglob("*.data")}
    assert kept == {"source.data", "t3.data"}


@pytest.mark.slow
def test_device_that_joins_t5s_cached_epochs_is_taken_in_and_moves_no_bit(folder, tmp_path, gate, cleanup, monkeypatch):
    priced, on_considered = threading.Event(), Replanner._on_considered

    def considered(replanner, task):
        on_considered(replanner, task)
        priced.set()

    monkeypatch.setattr(Replanner, "_on_considered", considered)
    coordinator = ThreadCoordinator(tmp_path / "state")
    cleanup.callback(coordinator.close)
    people, agents, epochs = People(coordinator.endpoints.people_address), [], 30
    cleanup.callback(people.close)

    def join(name):
        settings = {"host_id": name, "timings": TIMINGS, "weights": weights_of(tmp_path / name)}
        agents.append(ThreadAgent(coordinator.endpoints.devices_address, name, **settings))
        cleanup.callback(agents[-1].close)
        wait_until(lambda: len(people.devices()) == len(agents), f"{name} attached")

    join("first")
    gate.hold_at(4)
    spec = spec_of(folder, tmp_path / "adapter", stages=None, epochs=epochs, replan="auto")
    job_id = people.submit(spec)
    people.wait_for_step(job_id, 4)
    join("second")
    gate.hold_at(8)  # the next commit sees it
    assert priced.wait(WAIT_S), "no other plan was looked for"
    gate.open()
    found = finished(people, job_id, tmp_path / "adapter")

    assert found[:2] == uncached(folder, tmp_path, epochs=epochs)
    both = ["first", "second"]
    assert phases_of(agents) == [(False, ["first"]), (True, ["first"]), (False, both), (True, both), (False, both)]
    assert any("second joined" in reason for _, reason in found[2])
