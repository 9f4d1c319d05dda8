"""The search of layouts alone, which is all that a large fleet gets: against the proof on fleets where there is one."""

from __future__ import annotations

import random

import pytest

from benchmarks.fleets import llama_table, lora_job, random_fleet
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
