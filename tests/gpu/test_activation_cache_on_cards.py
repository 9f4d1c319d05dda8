"""The activation cache of a worker on a card: the processor's bytes, and the bits of blocks that run. ``make gpu``."""

from __future__ import annotations

import pytest
import torch

from edge_node.activation_cache.codecs import decode, encode
from edge_node.activation_cache.stage_cache import StageCache
from edge_node.activation_cache.store import ActivationStore
from edge_node.engine.reference import InProcessPipeline
from edge_node.stage.random_source import RandomSource
from plutino.job.assignment import StageShape
from plutino.job.method import ParallelAdaptersConfig
from plutino.sizes import MIB
from tests.gpu.test_cuda_worker import CONFIG
from tests.numerics.pipelines import make_batches, make_spec, train

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("width", [32, 200, 288, 1024])
@pytest.mark.parametrize("codec", ["raw", "bf16", "int8", "int4"])
def test_states_are_coded_on_the_card_to_the_processors_bytes_and_back_to_its_numbers(codec, width):
    states = 30 * torch.randn(500, width, generator=torch.Generator().manual_seed(width)) ** 3
    here, there = encode(codec, states), encode(codec, states.cuda())

    assert torch.equal(there.cpu(), here)
    assert torch.equal(decode(codec, there, width, torch.float32).cpu(), decode(codec, here, width, torch.float32))


@pytest.mark.parametrize("codec", ["raw", "int4"])
def test_epochs_from_the_cache_on_a_card_have_the_bits_of_its_first_one_or_train_as_well(tmp_path, codec):
    spec = make_spec(tmp_path).model_copy(update={"method": ParallelAdaptersConfig(reduction=4)})
    batches, read = make_batches(num_steps=2), []

    def losses(is_cached):
        caches = []

        def cache_of(stage):
            caches.append(StageCache(ActivationStore(tmp_path / codec, 64 * MIB), "tiny", stage, codec))
            return caches[-1]

        options = {"activation_cache": cache_of} if is_cached else {}
        stages = [StageShape(start_block=0, end_block=4)]
        with InProcessPipeline(
            lambda: RandomSource(CONFIG), spec, stages, total_steps=6, device=torch.device("cuda:0"), **options
        ) as pipeline:
            found = [train(pipeline, batches, first_step=2 * epoch) for epoch in range(3)]
        read.append(sum(cache.counts.rows_read for cache in caches))
        for cache in caches:
            cache.close()
        return [decision.loss for epoch in found for decision in epoch]

    plain, cached = losses(False), losses(True)

    assert cached == (plain if codec == "raw" else pytest.approx(plain, rel=0.05))
    assert read == [0, 2 * sum(len(rows.lengths) for batch in batches for rows in batch.rows)]
