"""Whole jobs with an activation cache over real gRPC: the bits of jobs without one, and what people are told."""

from __future__ import annotations

from contextlib import ExitStack

from edge_node.weights_config import WeightsConfig
from plutino.assets import SNIPS_DIR, TINY_LLAMA_DIR
from tests.integration.stack import People, ThreadAgent, ThreadCoordinator, losses, make_spec, wait_until

NUM_ROWS = 12


def job(people, output, **training):
    spec = make_spec(
        TINY_LLAMA_DIR,
        SNIPS_DIR / "train.jsonl",
        output,
        data={"train": str(SNIPS_DIR / "train.jsonl"), "limit": NUM_ROWS},
        training={
            "epochs": 3,
            "batch_size": 5,
            "micro_batch_size": 2,
            "lr": 2e-3,
            "activation_cache": "raw",
            **training,
        },
        placement={"stages": 2},
        method={"type": "parallel_adapters", "reduction": 4},
    )
    job_id = people.submit(spec)
    assert people.wait(job_id).state == "succeeded", people.job(job_id)
    steps = [event for kind, event in people.events(job_id) if kind == "StepCommitted"]
    notices = [event["text"] for kind, event in people.events(job_id) if kind == "Notice"]
    return people.detail(job_id), steps, notices, (output / "adapter_model.safetensors").read_bytes()


def test_cached_job_has_the_bits_of_an_uncached_one_skips_its_blocks_and_says_what_has_no_room(tmp_path):
    def allowed(index, num_bytes):
        folder = tmp_path / f"device{index}"
        return WeightsConfig(
            cache_dir=folder / "weights",
            cache_bytes=0,
            activation_dir=folder / "activations",
            activation_bytes=num_bytes,
        )

    with ExitStack() as stack:
        coordinator = ThreadCoordinator(tmp_path / "state")
        stack.callback(coordinator.close)
        people = People(coordinator.endpoints.people_address)
        stack.callback(people.close)
        agents = []
        for index in range(2):
            agents.append(
                ThreadAgent(coordinator.endpoints.devices_address, f"device{index}", weights=allowed(index, 0))
            )
            stack.callback(agents[-1].close)
        wait_until(lambda: len(people.devices()) == 2, "both agents attached")

        uncached = job(people, tmp_path / "uncached")
        for index, agent in enumerate(agents):
            agent._weights = allowed(index, 1 << 30)
        cached = job(people, tmp_path / "cached")
        for index, agent in enumerate(agents):
            agent._weights = allowed(index + 2, 200_000)
        crowded = job(people, tmp_path / "crowded")

    for detail, _, _, adapter in (cached, crowded):
        assert losses(detail) == losses(uncached[0])
        assert adapter == uncached[3]
    rows = [row for row in uncached[0]["ledger"] if row["status"] == "committed"]
    assert len(rows) == 9  # three epochs of 5, 5 and 2 rows, or what their micro-batches make in another order
    for _, steps, _, _ in (uncached, cached, crowded):
        assert len(steps) == 9
    # Both workers gave every row of the second and third epoch from the cache.
    assert [worker["cached_rows"] for worker in cached[1][-1]["workers"]] == [2 * NUM_ROWS] * 2
    assert not any(worker["left_out_rows"] for worker in cached[1][-1]["workers"])
    assert not any("activation cache" in text for text in cached[2])
    assert any(worker["left_out_rows"] for worker in crowded[1][-1]["workers"])
    assert any("no more room" in text and "--activation-cache" in text for text in crowded[2])
