"""What the planner counts for a method's layers against what autograd keeps of one block."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from partitioner.activations import saved_block_bytes
from partitioner.adapter import adapter_params_of
from partitioner.shape import JobShape
from plutino.families import ATTENTION_OUTPUT, MLP_INNER, family_of
from plutino.job.method import AdaptersConfig, PrefixConfig, PTuningV2Config
from plutino.load_adapter import Bottleneck, insert_bottleneck
from tests.numerics.test_family_memory import LOOSEST, TINY_TOKENS, kept_ratio
from tests.numerics.test_planner_formulas import DTYPES, ROWS, TOKENS, config_of, saved_bytes, table_of
from tests.numerics.tiny_families import CONFIGS, make_config

PASTS = {
    "plain": PrefixConfig(num_virtual_tokens=9),
    "projected": PrefixConfig(num_virtual_tokens=9, projection=True, encoder_hidden_size=24),
    "dropout": PTuningV2Config(num_virtual_tokens=9, dropout=0.1),
}
# Its blocks differ in what they rotate, so that two of them cannot be subtracted from three.
LIKE_BLOCKS = sorted(CONFIGS.keys() - {"smollm3"})


class Wrapped(torch.nn.Module):
    """Has the base model where peft's models have it."""

    def __init__(self, model):
        super().__init__()
        self.base_model = torch.nn.Module()
        self.base_model.model = model


def adapted_model(family, method, num_blocks, dtype):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(family, num_blocks)).to(dtype).eval().requires_grad_(False)
    known = family_of(family)
    reads = (ATTENTION_OUTPUT, MLP_INNER) if method.placement == "houlsby" else (MLP_INNER,)
    for block in range(num_blocks):
        for name in known.sublayer_outputs(reads):
            bottleneck = Bottleneck(
                64, method.bottleneck, method.activation, device=torch.device("cpu"), generator=None
            )
            layer = model.get_submodule(f"{known.block_prefix}{block}.{name}")
            layer.add_module("adapter", bottleneck)  # so that its parameters count as the model's own
            insert_bottleneck(layer, bottleneck)
    return Wrapped(model)


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_saved_bytes_of_a_block_with_adapters_stay_below_the_planners_and_near(family, dtype, placement):
    table, method = table_of(family), AdaptersConfig(bottleneck=16, placement=placement, activation="gelu")
    two, three = (saved_bytes(adapted_model(family, method, n, DTYPES[dtype]), DTYPES[dtype]) for n in (2, 3))
    fields = adapter_params_of(table, method).shape_fields
    shape = JobShape(dtype=dtype, batch_rows=ROWS, micro_batch_rows=ROWS, row_tokens=TOKENS, label_tokens=1, **fields)

    assert 1.0 <= saved_block_bytes(table, shape, 1) / (three - two) <= 1.05


@pytest.mark.parametrize("past", PASTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_saved_bytes_of_a_block_with_a_past_stay_below_the_planners_and_near(family, dtype, past):
    assert 1.0 <= kept_ratio(make_config(family).to_dict(), dtype, TINY_TOKENS, PASTS[past]) <= 1.05


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", LIKE_BLOCKS)
def test_block_with_a_past_of_every_family_keeps_no_more_than_predicted(family, dtype):
    assert 1.0 <= kept_ratio(make_config(family).to_dict(), dtype, TINY_TOKENS, PASTS["plain"]) <= LOOSEST
