"""What a stage on a CUDA card computes, trains and holds. Needs a card: ``make gpu``."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from edge_node.compute_device import open_device
from edge_node.engine.reference import InProcessPipeline
from edge_node.profile import measure, probe_dtypes
from edge_node.quantize.registry import SCHEMES
from edge_node.stage.random_source import RandomSource
from partitioner.device import ProfileRequest
from plutino.dtypes import offered_dtypes
from plutino.job.assignment import StageShape
from plutino.job.method import LoraConfig
from plutino.job.model import Packing
from plutino.sizes import MIB
from tests.numerics.pipelines import make_batches, make_spec, train

pytestmark = pytest.mark.gpu

CONFIG = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


def losses_on(device: str, scheme: str, cuts: tuple[int, ...] = (0, 2, 4), dtype=torch.float32) -> list[float]:
    source = RandomSource(CONFIG)
    stages = [StageShape(start_block=start, end_block=end) for start, end in pairwise(cuts)]
    spec = make_spec(Path("model"), target_modules="all-linear")
    packing = Packing(scheme=scheme, embedding="int8", head="int8")
    with InProcessPipeline(
        lambda: source, spec, stages, total_steps=6, packing=packing, device=torch.device(device), dtype=dtype
    ) as pipeline:
        return [decision.loss for decision in train(pipeline, [make_batches(1)[0]] * 4)]


@pytest.mark.parametrize("scheme", ["none", *SCHEMES])
def test_training_on_the_card_follows_the_processor(scheme):
    on_cpu, on_card = losses_on("cpu", scheme), losses_on("cuda:0", scheme)

    assert on_card == pytest.approx(on_cpu, rel=1e-3)
    assert on_card[-1] < 0.97 * on_card[0]


@pytest.mark.parametrize("scheme", ["none", *SCHEMES])
def test_partition_on_one_card_does_not_change_a_loss(scheme):
    assert losses_on("cuda:0", scheme, (0, 4)) == losses_on("cuda:0", scheme, (0, 1, 3, 4))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_packed_bytes_on_the_card_are_those_of_the_processor(scheme):
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    on_cpu, on_card = SCHEMES[scheme].pack(weight), SCHEMES[scheme].pack(weight.cuda())

    for name, tensor in on_cpu.items():
        # A value on the border of two codes may fall either way; never by more than one code, and seldom.
        different = (on_card[name].cpu() != tensor).float().mean()
        assert different <= 1e-3, f"{name} differs in {different:.2%}"
    unpacked = SCHEMES[scheme].unpack(on_cpu, torch.empty_like(weight))
    moved = {name: tensor.cuda() for name, tensor in on_cpu.items()}
    same = SCHEMES[scheme].unpack(moved, torch.empty_like(weight, device="cuda")).cpu()
    torch.testing.assert_close(same, unpacked, rtol=1e-6, atol=0)


def test_budget_of_the_card_makes_a_larger_allocation_fail():
    device = open_device("cuda")
    total_bytes = torch.cuda.get_device_properties(0).total_memory
    try:
        device.hold_to(device.held_bytes() + 256 * MIB, keeps_heap=False)
        with pytest.raises(torch.cuda.OutOfMemoryError):
            torch.empty(512 * MIB, dtype=torch.uint8, device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        assert device.held_bytes() < total_bytes


def test_card_is_measured_with_a_scheme_and_prefers_bf16():
    device = open_device("cuda")
    request = ProfileRequest(
        config_json='{"model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, '
        '"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 128, "tie_word_embeddings": false}',
        dtype="bf16",
        packing=Packing(scheme="nf4"),
        micro_batch_rows=1,
        row_tokens=32,
        label_tokens=8,
        method=LoraConfig(rank=4),
        threads=1,
    )

    timings = measure(request, device)

    assert timings.forward_s > 0 and timings.backward_s > 0
    assert offered_dtypes(probe_dtypes(device))[0] == "bf16"
