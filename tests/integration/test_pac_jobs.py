"""Whole jobs with an activation cache over real gRPC: the bits of jobs without one, and what people are told."""

from __future__ import annotations

from contextlib import contextmanager

import pytest

from edge_node.weights_config import WeightsConfig
from plutino.assets import SNIPS_DIR, TINY_LLAMA_DIR
from tests.integration.stack import People, ThreadAgent, ThreadCoordinator, losses, make_spec, wait_until

NUM_ROWS = 12


SIDE = {"type": "parallel_adapters", "reduction": 4}
UPPER = {"type": "lora", "rank": 4, "target_modules": ["q_proj", "down_proj"], "dropout": 0.1, "blocks": "last 2"}


@contextmanager
def two_devices(folder):
    """People, and what gives both devices another cache of so many bytes."""
    coordinator = ThreadCoordinator(folder / "state")
    people, agents = People(coordinator.endpoints.people_address), []

    def allow(number, num_bytes):
        for index, agent in enumerate(agents):
            own = folder / f"device{index}-{number}"
            agent._weights = WeightsConfig(
                cache_dir=own / "weights",
                cache_bytes=0,
                activation_dir=own / "activations",
                activation_bytes=num_bytes,
            )

    try:
        for index in range(2):
            agents.append(ThreadAgent(coordinator.endpoints.devices_address, f"device{index}"))
        wait_until(lambda: len(people.devices()) == 2, "both agents attached")
        yield people, allow
    finally:
        for agent in agents:
            agent.close()
        people.close()
        coordinator.close()


def job(people, output, method=SIDE, **training):
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
        method=method,
    )
    job_id = people.submit(spec)
    assert people.wait(job_id).state == "succeeded", people.job(job_id)
    steps = [event for kind, event in people.events(job_id) if kind == "StepCommitted"]
    notices = [event["text"] for kind, event in people.events(job_id) if kind == "Notice"]
    return people.detail(job_id), steps, notices, (output / "adapter_model.safetensors").read_bytes()


# Both workers read a side network's states; of the frozen blocks below it the one with the lowest trained block does.
@pytest.mark.parametrize(
    ("method", "readers"),
    [pytest.param(SIDE, 2, id="side"), pytest.param(UPPER, 1, id="upper", marks=pytest.mark.slow)],
)
def test_cached_job_has_the_bits_of_an_uncached_one_skips_its_blocks_and_says_what_has_no_room(
    tmp_path, method, readers
):
    with two_devices(tmp_path) as (people, allow):
        found = []
        for number, num_bytes in enumerate((0, 1 << 30, 200_000 if method is SIDE else 100_000)):
            allow(number, num_bytes)
            found.append(job(people, tmp_path / f"adapter{number}", method))
    uncached, cached, crowded = found

    for detail, _, _, adapter in (cached, crowded):
        assert losses(detail) == losses(uncached[0])
        assert adapter == uncached[3]
    rows = [row for row in uncached[0]["ledger"] if row["status"] == "committed"]
    assert len(rows) == 9  # three epochs of 5, 5 and 2 rows, or what their micro-batches make in another order
    for _, steps, _, _ in (uncached, cached, crowded):
        assert len(steps) == 9
    # Every row of the second and third epoch came from the cache.
    cached_rows = [worker["cached_rows"] for worker in cached[1][-1]["workers"]]
    assert sorted(cached_rows) == [0] * (2 - readers) + [2 * NUM_ROWS] * readers
    assert not any(worker["left_out_rows"] for worker in cached[1][-1]["workers"])
    assert not any("activation cache" in text for text in cached[2])
    assert any(worker["left_out_rows"] for worker in crowded[1][-1]["workers"])
    assert any("no more room" in text and "--activation-cache" in text for text in crowded[2])
