from __future__ import annotations

import random

import pytest

from benchmarks.fleets import llama_table, lora_job, random_fleet
from partitioner import search as search_module
from partitioner.question import Question, open_question
from partitioner.search import answer
from partitioner.spread import PartResult, SearchPart, estimated_s, in_turn, is_long


def question(seed: int) -> Question:
    table = llama_table(12, 256, vocab=2_000)
    shape = lora_job(table, batch_rows=8, micro_batch_rows=2, row_tokens=64)
    devices, links = random_fleet(random.Random(seed), table, shape, 7, tightness=(2.0, 4.0))
    return open_question(table, shape, devices, links, codecs=("raw", "bf16"), allow_replicas=True)


@pytest.fixture
def every_search_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_module, "is_long", lambda num_blocks, num_devices: True)


def elsewhere_and_backwards(parts, run):
    """Parts cross a border as JSON and run in the reverse order, each from nothing."""
    results = [
        PartResult.model_validate_json(run(SearchPart.model_validate_json(part.model_dump_json())).model_dump_json())
        for part in reversed(parts)
    ]
    return results[::-1]


@pytest.mark.usefixtures("every_search_is_long")
@pytest.mark.parametrize("seed", range(2))
def test_long_search_gives_the_same_plan_wherever_its_parts_run(seed):
    asked = question(seed)
    num_parts = []

    def counted(parts, run):
        num_parts.append(len(parts))
        return elsewhere_and_backwards(parts, run)

    assert answer(asked, fan=counted) == answer(asked, fan=in_turn)
    assert num_parts[0] >= 2


@pytest.mark.usefixtures("every_search_is_long")
def test_long_search_keeps_every_device_within_its_budget():
    plan = answer(question(2))

    assert all(r.peak_bytes <= r.budget_bytes for stage in plan.stages for r in stage.replicas)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("num_blocks", "num_devices", "replicas"), [(80, 24, False), (60, 32, True), (90, 40, True)])
def test_long_search_is_about_as_good_in_parts_as_in_one(seed, num_blocks, num_devices, replicas, monkeypatch):
    table = llama_table(num_blocks, 1024)
    shape = lora_job(table, batch_rows=16, micro_batch_rows=4, row_tokens=256)
    devices, links = random_fleet(random.Random(seed), table, shape, num_devices)
    asked = open_question(table, shape, devices, links, codecs=("raw", "bf16"), allow_replicas=replicas)

    in_parts = answer(asked).step_s
    monkeypatch.setattr(search_module, "is_long", lambda num_blocks, num_devices: False)
    in_one = answer(asked).step_s

    # Two heuristics; measured between 0.97 and 1.05 of each other.
    assert in_parts <= 1.1 * in_one


def test_is_long_follows_from_size_alone():
    assert not is_long(80, 16)
    assert is_long(80, 24)
    assert estimated_s(80, 16) == pytest.approx(0.96)
