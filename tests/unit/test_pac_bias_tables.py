"""T5's position biases by a table of a block's own."""

from __future__ import annotations

import pytest
import torch
from transformers import T5Config
from transformers.models.t5.modeling_t5 import T5Attention

from plutino.bias_tables import bias_by_own_table


@pytest.mark.parametrize("is_decoder", [False, True], ids=["encoder", "decoder"])
def test_biases_are_the_bits_of_the_module_s_own_and_its_table_learns_after_inference_mode(is_decoder):
    torch.manual_seed(0)
    config = T5Config(d_model=16, d_kv=4, num_heads=4, is_decoder=is_decoder)
    attention = T5Attention(config, has_relative_attention_bias=True, layer_idx=0).eval()
    hidden_BTD = torch.randn(2, 40, 16)
    expected, biases, _ = attention(hidden_BTD)

    block = torch.nn.ModuleDict({"attention": attention})
    bias_by_own_table(block, "attention.relative_attention_bias.weight")
    with torch.inference_mode():
        attention(hidden_BTD)
    found, own_biases, _ = attention(hidden_BTD, position_bias=torch.zeros_like(biases))

    assert torch.equal(found, expected)
    assert torch.equal(own_biases, biases)
    found.sum().backward()
    assert attention.relative_attention_bias.weight.grad.abs().sum() > 0
