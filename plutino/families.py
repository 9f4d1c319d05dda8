"""Model families, an entry each.

To add a family: one entry in :data:`FAMILIES`, one line in ``docs/ref-families.md``, a tiny configuration in
``tests/numerics/tiny_families.py``. What an entry says is told in ``plutino.family``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from plutino.encoder_families import ENCODER_FAMILIES
from plutino.errors import ModelError
from plutino.family import ATTENTION_OUTPUT, MLP_INNER, SIZE_DEFAULTS, SIZE_KEYS, Family, LinearRule, ScoreHead

__all__ = [
    "ATTENTION_OUTPUT",
    "EMBEDDING_NAMES",
    "FAMILIES",
    "MLP_INNER",
    "Family",
    "LinearRule",
    "ScoreHead",
    "family_of",
]

_LLAMA = Family(
    model_type="llama",
    block_prefix="model.layers.",
    optional_prefix="model.",
    embedding=("model.embed_tokens.weight",),
    final=("model.norm.",),
    ignored=("rotary_emb.inv_freq",),
    linears={
        "self_attn.q_proj": LinearRule("hidden", "query", "attention input"),
        "self_attn.k_proj": LinearRule("hidden", "key", "attention input"),
        "self_attn.v_proj": LinearRule("hidden", "key", "attention input"),
        "self_attn.o_proj": LinearRule("query", "hidden", ATTENTION_OUTPUT),
        "mlp.gate_proj": LinearRule("hidden", "inner", "mlp input"),
        "mlp.up_proj": LinearRule("hidden", "inner", "mlp input"),
        "mlp.down_proj": LinearRule("inner", "hidden", MLP_INNER),
    },
    config_keys=SIZE_KEYS,
    size_defaults=SIZE_DEFAULTS,
)

_GPT2 = Family(
    model_type="gpt2",
    block_prefix="transformer.h.",
    optional_prefix="transformer.",
    embedding=("transformer.wte.weight", "transformer.wpe.weight"),
    final=("transformer.ln_f.",),
    ignored=(".attn.bias", ".attn.masked_bias"),
    entry_sums=("transformer.wpe",),
    has_conv1d=True,
    linears={
        "attn.c_attn": LinearRule("hidden", "3hidden", "attention input"),
        "attn.c_proj": LinearRule("hidden", "hidden", ATTENTION_OUTPUT),
        "mlp.c_fc": LinearRule("hidden", "inner", "mlp input"),
        "mlp.c_proj": LinearRule("inner", "hidden", MLP_INNER),
    },
    config_keys={
        **SIZE_KEYS,
        "blocks": ("n_layer",),
        "hidden": ("n_embd",),
        "inner": ("n_inner",),
        "heads": ("n_head",),
        "positions": ("n_positions",),
    },
    size_defaults={**SIZE_DEFAULTS, "inner": "4hidden"},
    is_tied_by_default=True,
    norm="layer",
    is_gated=False,
    activation_keys=("activation_function",),
    activation_default="gelu_new",
)

_GEMMA2 = replace(
    _LLAMA,
    model_type="gemma2",
    # Soft-capped scores are not what sdpa computes.
    attention="eager",
    size_defaults={**SIZE_DEFAULTS, "head_dim": 256},
    is_tied_by_default=True,
    num_norms=4,
    norm_adds_one=True,
    has_soft_caps=True,
    activation_keys=("hidden_activation",),
    activation_default="gelu_pytorch_tanh",
)


def _qkv_linears(attention: str) -> dict[str, LinearRule]:
    """A fused projection of queries, keys and values, and an MLP without gate, as in Megatron's models."""
    return {
        f"{attention}.query_key_value": LinearRule("hidden", "query+2key", "attention input"),
        f"{attention}.dense": LinearRule("query", "hidden", ATTENTION_OUTPUT),
        "mlp.dense_h_to_4h": LinearRule("hidden", "inner", "mlp input"),
        "mlp.dense_4h_to_h": LinearRule("inner", "hidden", MLP_INNER),
    }


_BLOOM = Family(
    model_type="bloom",
    block_prefix="transformer.h.",
    optional_prefix="transformer.",
    embedding=(
        "transformer.word_embeddings.weight",
        "transformer.word_embeddings_layernorm.weight",
        "transformer.word_embeddings_layernorm.bias",
    ),
    final=("transformer.ln_f.",),
    attention="eager",
    adds_alibi=lambda config: True,
    linears=_qkv_linears("self_attention"),
    config_keys={
        **SIZE_KEYS,
        "blocks": ("num_hidden_layers", "n_layer"),
        "hidden": ("n_embed", "hidden_size"),
        "inner": (),
        "heads": ("num_attention_heads", "n_head"),
        "kv_heads": (),
        "positions": ("seq_length",),
    },
    size_defaults={**SIZE_DEFAULTS, "inner": "4hidden", "positions": 2048},
    is_tied_by_default=True,
    norm="layer",
    is_gated=False,
    activation_keys=(),
    activation_default="bloom_gelu",
)


def _fix_falcon_sizes(config: Mapping[str, Any], sizes: dict[str, int]) -> None:
    if config.get("new_decoder_architecture", False):
        # Keys and values are repeated for every head before they reach the cache.
        sizes["cached_heads"] = sizes["heads"]
    else:
        sizes["kv_heads"] = 1 if config.get("multi_query", True) else sizes["heads"]


def _fused_experts(names: tuple[str, ...]) -> dict[str, str]:
    why = "it names experts, whose weights transformers keeps fused in one tensor a block that LoRA cannot wrap"
    return dict.fromkeys(names, why) | {"gate": "the router that chooses experts is never trained"}


_ALL = (
    _LLAMA,
    _GPT2,
    replace(_LLAMA, model_type="qwen2"),
    replace(_LLAMA, model_type="qwen3", size_defaults={**SIZE_DEFAULTS, "head_dim": 128}, qk_norm="head"),
    replace(
        _LLAMA,
        model_type="qwen3_moe",
        merged={
            "mlp.experts.gate_up_proj": ("gate_proj.weight", "up_proj.weight"),
            "mlp.experts.down_proj": ("down_proj.weight",),
        },
        # Where some blocks have a plain MLP, stock peft still reads its names as those of the experts.
        linears={name: rule for name, rule in _LLAMA.linears.items() if name.startswith("self_attn.")},
        untargetable=_fused_experts(("gate_proj", "up_proj", "down_proj", "gate_up_proj", "experts")),
        config_keys={
            **SIZE_KEYS,
            "expert_inner": ("moe_intermediate_size",),
            "experts_per_token": ("num_experts_per_tok",),
            "experts": ("num_experts", "num_local_experts"),
        },
        size_defaults={**SIZE_DEFAULTS, "expert_inner": 768, "experts_per_token": 8, "experts": 128},
        qk_norm="head",
    ),
    replace(_LLAMA, model_type="mistral"),
    _GEMMA2,
    replace(_GEMMA2, model_type="gemma3_text", attention="sdpa", qk_norm="head"),
    replace(
        _LLAMA,
        model_type="phi3",
        linears={
            "self_attn.qkv_proj": LinearRule("hidden", "query+2key", "attention input"),
            "self_attn.o_proj": LinearRule("query", "hidden", ATTENTION_OUTPUT),
            "mlp.gate_up_proj": LinearRule("hidden", "2inner", "mlp input"),
            "mlp.down_proj": LinearRule("inner", "hidden", MLP_INNER),
        },
        keeps_fused_qkv=True,
    ),
    Family(
        model_type="gpt_neox",
        block_prefix="gpt_neox.layers.",
        optional_prefix="gpt_neox.",
        embedding=("gpt_neox.embed_in.weight",),
        final=("gpt_neox.final_layer_norm.",),
        renamed={"embed_out.weight": "lm_head.weight"},
        ignored=(".attention.bias", ".attention.masked_bias", "rotary_emb.inv_freq"),
        linears=_qkv_linears("attention"),
        config_keys={**SIZE_KEYS, "kv_heads": (), "head_dim": ()},
        size_defaults=SIZE_DEFAULTS,
        norm="layer",
        is_gated=False,
        activation_default="gelu",
        keeps_fused_qkv=True,
    ),
    Family(
        model_type="opt",
        block_prefix="model.decoder.layers.",
        optional_prefix="model.",
        embedding=("model.decoder.embed_tokens.weight", "model.decoder.embed_positions.weight"),
        optional_embedding=("model.decoder.project_in.weight",),
        final=("model.decoder.final_layer_norm.", "model.decoder.project_out."),
        entry_sums=("model.decoder.embed_positions",),
        linears={
            "self_attn.q_proj": LinearRule("hidden", "query", "attention input"),
            "self_attn.k_proj": LinearRule("hidden", "key", "attention input"),
            "self_attn.v_proj": LinearRule("hidden", "key", "attention input"),
            "self_attn.out_proj": LinearRule("query", "hidden", ATTENTION_OUTPUT),
            "fc1": LinearRule("hidden", "inner", "mlp input"),
            "fc2": LinearRule("inner", "hidden", MLP_INNER),
        },
        config_keys={
            **SIZE_KEYS,
            "inner": ("ffn_dim",),
            "kv_heads": (),
            "head_dim": (),
            "embedding": ("word_embed_proj_dim",),
        },
        size_defaults=SIZE_DEFAULTS,
        is_tied_by_default=True,
        norm="layer",
        is_gated=False,
        activation_keys=("activation_function",),
        activation_default="relu",
    ),
    replace(
        _BLOOM,
        model_type="falcon",
        embedding=("transformer.word_embeddings.weight",),
        ignored=("rotary.inv_freq", "rotary_emb.inv_freq"),
        attention="sdpa",
        adds_alibi=lambda config: bool(config.get("alibi", False)),
        config_keys={
            **SIZE_KEYS,
            "hidden": ("n_embed", "hidden_size"),
            "inner": ("ffn_hidden_size",),
            "kv_heads": ("num_kv_heads",),
            "head_dim": (),
        },
        size_defaults={**SIZE_DEFAULTS, "inner": "4hidden", "positions": 2048},
        fix_sizes=_fix_falcon_sizes,
        activation_keys=("activation",),
        activation_default="gelu",
        broadcasts_keys=True,
        keeps_fused_qkv=True,
    ),
    _BLOOM,
    replace(_LLAMA, model_type="olmo2", qk_norm="whole"),
    replace(_LLAMA, model_type="granite", entry_factors=("model.embedding_multiplier",), score_head=None),
    replace(_LLAMA, model_type="smollm3", is_tied_by_default=True),
)

FAMILIES: Mapping[str, Family] = {family.model_type: family for family in (*_ALL, *ENCODER_FAMILIES)}


EMBEDDING_NAMES = frozenset(family.embedding[0].split(".")[-2] for family in FAMILIES.values())
"""What token embeddings are called, over all families."""


def family_of(model_type: str | None) -> Family:
    """Look a family up.

    Raises:
        ModelError: plutino does not know the family.
    """
    try:
        return FAMILIES[str(model_type)]
    except KeyError:
        known = ", ".join(sorted(FAMILIES))
        raise ModelError(
            f"model family {model_type!r} is not supported; plutino knows {known}. "
            "docs/ref-families.md tells how a family is added"
        ) from None
