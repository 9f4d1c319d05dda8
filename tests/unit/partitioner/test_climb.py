"""The search of layouts alone, which is all that a large fleet gets: against the proof on fleets where there is one."""

from __future__ import annotations

import random

import pytest

from benchmarks.fleets import FAST_ETHERNET, device_of, llama_table, lora_job, random_fleet
from partitioner.device import LinkTable
from partitioner.fitting import fits
from partitioner.search import search
from tests.sampling import sampled

MOST_EXCESS = 0.02


@pytest.mark.parametrize("seed", sampled(list(range(200)), 6))
def test_search_without_proof_is_within_two_percent_of_the_proved_best(seed):
    generator = random.Random(seed)
    table = llama_table(generator.randint(3, 7), 512)
    shape = lora_job(table, batch_rows=8, micro_batch_rows=generator.choice([1, 2, 4]), row_tokens=64)
    devices, links = random_fleet(generator, table, shape, generator.randint(2, 4), tightness=(0.6, 0.9, 1.3, 2.0, 4.0))
    if not fits(table, shape, devices, links):
        pytest.skip("nothing fits this fleet")

    proved = search(table, shape, devices, links, allow_replicas=True)
    climbed = search(table, shape, devices, links, allow_replicas=True, proof_work=0)

    assert climbed.step_s <= proved.step_s * (1 + MOST_EXCESS)


def test_search_without_proof_finds_replicas_whose_step_was_guessed_a_third_too_long():
    # One of 500 small cases, in which only the six best guesses were once looked at closely: 18 % off.
    table = llama_table(6, 512)
    shape = lora_job(table, batch_rows=8, micro_batch_rows=2, row_tokens=256)
    rooms = {"d0": (4.0, 292_007_498), "d1": (1.0, 189_804_874), "d2": (1.0, 584_014_997)}
    devices = [device_of(name, speed, room_bytes, table, shape) for name, (speed, room_bytes) in rooms.items()]
    links = LinkTable(other=FAST_ETHERNET)

    proved = search(table, shape, devices, links, allow_replicas=True)
    climbed = search(table, shape, devices, links, allow_replicas=True, proof_work=0)

    assert climbed.step_s == proved.step_s
    assert [stage.device_names for stage in climbed.stages] == [("d2", "d1"), ("d0",)]
