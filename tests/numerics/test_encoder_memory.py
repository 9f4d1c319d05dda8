"""What blocks of encoders and of encoder-decoders keep for the backward pass, against the planner's prediction."""

from __future__ import annotations

from typing import Any
from weakref import ref

import pytest
import torch

from edge_node.methods.registry import METHODS as ATTACHED_BY
from edge_node.stage.build import build_stage
from edge_node.stage.passes import StageInput
from edge_node.stage.random_source import RandomSource
from partitioner.activations import saved_block_bytes
from plutino.job.method import AdaptersConfig, FullConfig, MethodConfig
from tests.numerics.test_family_memory import DTYPES, LOOSEST, LORA, ROWS, Kept, describe, job_shape, kept_ratio
from tests.numerics.tiny_families import ENCODER_DECODERS, ENCODERS, make_config
from tests.sampling import sampled

SOURCE_TOKENS, TARGET_TOKENS = 48, 12


@pytest.mark.parametrize(("name", "dtype"), sampled([(n, d) for n in ENCODERS for d in DTYPES], 1))
def test_block_of_an_encoder_keeps_what_is_predicted(name, dtype):
    assert kept_ratio(make_config(name).to_dict(), dtype, SOURCE_TOKENS) == 1


METHODS: dict[str, MethodConfig] = {
    "adapters": AdaptersConfig(bottleneck=6, placement="houlsby", activation="gelu"),
    "full": FullConfig(),
    "lora": LORA,
}


def kept_bytes(config: dict[str, Any], end_block: int, dtype: torch.dtype, method: MethodConfig) -> int:
    """Bytes of distinct storages that the graph of a forward pass of both halves holds, weights left out."""
    stage = build_stage(RandomSource(config), 0, end_block, dtype=dtype)
    attached = ATTACHED_BY[method.type](stage, method, seed=0)
    mask = torch.ones(ROWS, SOURCE_TOKENS, dtype=torch.long)
    mask[0, -3:] = 0
    inputs = StageInput(
        position_ids=torch.arange(SOURCE_TOKENS).expand(ROWS, SOURCE_TOKENS),
        input_ids=torch.zeros(ROWS, SOURCE_TOKENS, dtype=torch.long),
        target_ids=torch.zeros(ROWS, TARGET_TOKENS, dtype=torch.long),
        attention_mask=mask,
    )
    trained = (use for parameter in attached.parameters for _, use in parameter.uses)
    own = {parameter.untyped_storage().data_ptr() for parameter in (*stage.model.parameters(), *trained)}
    held = []

    def pack(tensor: torch.Tensor) -> Kept:
        kept = Kept(tensor)
        held.append(ref(kept))
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        output = stage.run(inputs)
    alive = [kept.tensor.untyped_storage() for reference in held if (kept := reference()) is not None]
    del output
    return sum({storage.data_ptr(): storage.nbytes() for storage in alive if storage.data_ptr() not in own}.values())


@pytest.mark.parametrize(
    ("name", "dtype", "method"),
    sampled(
        [(n, d, m) for n in ENCODER_DECODERS for d in DTYPES for m in METHODS],
        4,
        always=(
            ("t5", "fp32", "lora"),
            ("bart", "fp32", "lora"),
            ("t5_gated", "bf16", "full"),
            ("t5", "bf16", "adapters"),
        ),
    ),
)
def test_blocks_of_both_halves_keep_no_more_than_predicted(name, dtype, method):
    blocks = (
        {"encoder_layers": 3, "decoder_layers": 3} if name == "bart" else {"num_layers": 3, "num_decoder_layers": 3}
    )
    config = make_config(name, **blocks).to_dict()
    table = describe(config)
    shape = job_shape(table, dtype, SOURCE_TOKENS, METHODS[method]).model_copy(
        update={"label_tokens": ROWS * TARGET_TOKENS}
    )
    # Neither the first of a half, which keeps what the others share, nor the last, which has a norm behind it.
    for block in (1, 4):
        fewer, more = (kept_bytes(config, end, DTYPES[dtype], METHODS[method]) for end in (block, block + 1))

        assert 1 <= saved_block_bytes(table, shape, block) / (more - fewer) <= LOOSEST
