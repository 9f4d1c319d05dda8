"""Bytes that norms, attention and MLP of a block keep of one token for the backward pass, apart from any method.

See :mod:`partitioner.activations`, whose sums they are parts of.
"""

from __future__ import annotations

from collections.abc import Mapping

from partitioner.model import ModelTable
from plutino.families import Family, family_of

_FP32_BYTES = 4

_ACTIVATION_TENSORS: Mapping[str, int] = {
    # One kernel, which saves its input (relu: its output).
    "bloom_gelu": 1,
    "gelu": 1,
    "gelu_pytorch_tanh": 1,
    "relu": 1,
    "silu": 1,
    # Written out in Python: every product saves its factors.
    "gelu_fast": 6,
    "gelu_new": 4,
}
"""Tensors of intermediate size that an activation function keeps."""

_UNKNOWN_ACTIVATION_TENSORS = 6


def norm_token_bytes(table: ModelTable, family: Family, compute_bytes: int) -> int:
    """Of a block's norms, those of queries and keys included."""
    if family.norm == "layer":
        # Its input, mean and reciprocal standard deviation.
        return family.num_norms * compute_bytes * (table.hidden_size + 2)
    # The input in fp32, and one reciprocal root mean square.
    token_bytes = family.num_norms * _FP32_BYTES * (table.hidden_size + 1)
    if family.norm_keeps_input and compute_bytes < _FP32_BYTES:
        token_bytes += family.num_norms * compute_bytes * table.hidden_size
    for num_heads in (table.num_heads, table.num_kv_heads) if family.qk_norm != "none" else ():
        num_statistics = num_heads if family.qk_norm == "head" else 1
        token_bytes += _FP32_BYTES * (num_heads * table.head_dim + num_statistics)
    return token_bytes


def attention_token_bytes(
    table: ModelTable, family: Family, compute_bytes: int, row_tokens: int, *, has_past: bool
) -> int:
    """Of attention over rows of so many tokens, without what its linear layers keep.

    Args:
        table: of the model.
        family: of the model.
        compute_bytes: of a number in the compute dtype.
        row_tokens: that a token sees.
        has_past: virtual tokens stand before them.
    """
    query_size = table.num_heads * table.head_dim
    token_bytes = 4 * compute_bytes * query_size
    # Behind a past, keys and values are copies.
    if family.keeps_fused_qkv and not has_past:
        token_bytes += compute_bytes * (query_size + 2 * table.num_kv_heads * table.head_dim)
    scores = table.num_heads * row_tokens
    if family.attention == "eager":
        # Probabilities in fp32, once more in a narrower compute dtype, and what a soft cap of the scores keeps.
        copies_bytes = compute_bytes * ((compute_bytes < _FP32_BYTES) + family.has_soft_caps)
        return token_bytes + scores * (_FP32_BYTES + copies_bytes)
    token_bytes += compute_bytes * row_tokens * (table.num_heads if family.biases_heads else 1)
    token_bytes += _FP32_BYTES * table.num_heads
    return token_bytes + (_FP32_BYTES * scores if keeps_scores(table) else 0)


def keeps_scores(table: ModelTable) -> bool:
    """Whether attention holds a number for every pair of tokens and head."""
    family = family_of(table.family)
    return family.attention == "eager" or (family.broadcasts_keys and table.num_kv_heads < table.num_heads)


def mlp_token_bytes(table: ModelTable, family: Family, compute_bytes: int, block: int) -> int:
    """Of a block's MLP or experts."""
    num_tensors = _ACTIVATION_TENSORS.get(table.activation, _UNKNOWN_ACTIVATION_TENSORS) + 2 * family.is_gated
    if block not in table.expert_blocks:
        return num_tensors * compute_bytes * table.intermediate_size
    # What each chosen expert gives before its weight, with places and weights; the router's probabilities.
    expert_bytes = compute_bytes * (num_tensors * table.expert_inner + table.hidden_size) + 64
    return table.experts_per_token * expert_bytes + 2 * _FP32_BYTES * table.num_experts
