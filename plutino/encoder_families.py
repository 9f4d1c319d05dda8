"""Entries of families with an encoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from plutino.family import (
    ATTENTION_OUTPUT,
    ENCODER_OUTPUT,
    MLP_INNER,
    SIZE_DEFAULTS,
    SIZE_KEYS,
    Family,
    Halves,
    LinearRule,
    ScoreHead,
)

_NO_PAST = "its blocks take no keys and values from before the row"

_BERT = Family(
    model_type="bert",
    kind="encoder",
    block_prefix="bert.encoder.layer.",
    optional_prefix="bert.",
    embedding=(
        "bert.embeddings.word_embeddings.weight",
        "bert.embeddings.position_embeddings.weight",
        "bert.embeddings.token_type_embeddings.weight",
        "bert.embeddings.LayerNorm.weight",
        "bert.embeddings.LayerNorm.bias",
    ),
    final=("bert.pooler.",),
    head="",
    score_head=ScoreHead(module="classifier", layers=("",), has_bias=True, reads="first token", pooler="bert.pooler"),
    # The first checkpoints were TensorFlow's.
    renamed={"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"},
    ignored=("embeddings.position_ids", "embeddings.token_type_ids"),
    entry_modules=("bert.embeddings",),
    has_token_types=True,
    linears={
        "attention.self.query": LinearRule("hidden", "query", "attention input"),
        "attention.self.key": LinearRule("hidden", "query", "attention input"),
        "attention.self.value": LinearRule("hidden", "query", "attention input"),
        "attention.output.dense": LinearRule("query", "hidden", ATTENTION_OUTPUT),
        "intermediate.dense": LinearRule("hidden", "inner", "mlp input"),
        "output.dense": LinearRule("inner", "hidden", MLP_INNER),
    },
    named_elsewhere=("dense",),
    refused_methods={
        "prompt": "its score is read at a row's first token, whose place a prompt would take; use lora or adapters",
        "prefix": f"{_NO_PAST}; use lora or adapters",
        "p_tuning_v2": f"{_NO_PAST}; use lora or adapters",
    },
    config_keys={**SIZE_KEYS, "kv_heads": (), "head_dim": ()},
    size_defaults=SIZE_DEFAULTS,
    norm="layer",
    is_gated=False,
    activation_default="gelu",
)


def _fix_roberta_sizes(config: Mapping[str, Any], sizes: dict[str, int]) -> None:
    pad = config.get("pad_token_id", 1)
    # Up to the pad token's own id no position is a token's.
    sizes["positions"] -= 0 if pad is None else int(pad) + 1


_ROBERTA = replace(
    _BERT,
    model_type="roberta",
    block_prefix="roberta.encoder.layer.",
    optional_prefix="roberta.",
    embedding=tuple(name.replace("bert.", "roberta.", 1) for name in _BERT.embedding),
    # Its classes for sequences leave the pooler out.
    final=(),
    score_head=ScoreHead(module="classifier", layers=("dense", "out_proj"), has_bias=True, reads="first token"),
    renamed=None,
    entry_modules=("roberta.embeddings",),
    positions_after_pad=True,
    has_token_types=False,
    fix_sizes=_fix_roberta_sizes,
)


def _add_decoder_blocks(config: Mapping[str, Any], sizes: dict[str, int]) -> None:
    sizes["encoder_blocks"] = sizes["blocks"]
    sizes["blocks"] += sizes.pop("decoder_blocks")


_NOT_IN_TWO_HALVES = dict.fromkeys(
    ("prompt", "prefix", "p_tuning_v2"), "it knows models of one stack of blocks only; use lora or adapters"
)


_T5_INNER = ("wi", "wi_0", "wi_1")
"""One without a gate, two with it (T5 1.1)."""


def _t5_attention(name: str, reads: str) -> dict[str, LinearRule]:
    return {
        f"{name}.q": LinearRule("hidden", "query", f"{name} input"),
        f"{name}.k": LinearRule("hidden", "query", reads),
        f"{name}.v": LinearRule("hidden", "query", reads),
        f"{name}.o": LinearRule("query", "hidden", ATTENTION_OUTPUT),
    }


def _t5_mlp(layer: int) -> dict[str, LinearRule]:
    return {
        f"layer.{layer}.DenseReluDense.{name}": LinearRule("hidden", "inner", "mlp input") for name in _T5_INNER
    } | {f"layer.{layer}.DenseReluDense.wo": LinearRule("inner", "hidden", MLP_INNER)}


_T5_SELF = _t5_attention("layer.0.SelfAttention", "layer.0.SelfAttention input")

_T5 = Family(
    model_type="t5",
    kind="encoder-decoder",
    block_prefix="encoder.block.",
    optional_prefix="",
    halves=Halves(
        encoder="encoder",
        decoder="decoder",
        decoder_prefix="decoder.block.",
        decoder_linears={**_T5_SELF, **_t5_attention("layer.1.EncDecAttention", ENCODER_OUTPUT), **_t5_mlp(2)},
        encoder_final=("encoder.final_layer_norm.",),
        table="layer.0.SelfAttention.relative_attention_bias.weight",
    ),
    embedding=("shared.weight",),
    final=("decoder.final_layer_norm.",),
    score_head=None,
    # One that the first checkpoints hold and nobody reads; copies of the shared table.
    ignored=("EncDecAttention.relative_attention_bias.weight", "coder.embed_tokens.weight"),
    linears={**_T5_SELF, **_t5_mlp(1)},
    optional_linears=frozenset(f"layer.{layer}.DenseReluDense.{name}" for layer in (1, 2) for name in _T5_INNER),
    refused_methods=_NOT_IN_TWO_HALVES,
    config_keys={
        "blocks": ("num_layers",),
        "decoder_blocks": ("num_decoder_layers",),
        "hidden": ("d_model",),
        "inner": ("d_ff",),
        "heads": ("num_heads",),
        "kv_heads": (),
        "head_dim": ("d_kv",),
        "positions": (),
        "vocab": ("vocab_size",),
        "buckets": ("relative_attention_num_buckets",),
    },
    # Distances beyond the last bucket share it, so that rows may be of any length.
    size_defaults={**SIZE_DEFAULTS, "decoder_blocks": "blocks", "positions": 1 << 20, "buckets": 32},
    fix_sizes=_add_decoder_blocks,
    is_tied_by_default=True,
    always_tied=True,
    norm_keeps_input=True,
    biases_heads=True,
    is_gated=False,
    activation_keys=("feed_forward_proj",),
    activation_default="relu",
)


def _bart_attention(name: str, reads: str) -> dict[str, LinearRule]:
    return {
        f"{name}.q_proj": LinearRule("hidden", "query", f"{name} input"),
        f"{name}.k_proj": LinearRule("hidden", "query", reads),
        f"{name}.v_proj": LinearRule("hidden", "query", reads),
        f"{name}.out_proj": LinearRule("query", "hidden", ATTENTION_OUTPUT),
    }


_BART_MLP = {"fc1": LinearRule("hidden", "inner", "mlp input"), "fc2": LinearRule("inner", "hidden", MLP_INNER)}
_BART_SELF = _bart_attention("self_attn", "self_attn input")

_BART = Family(
    model_type="bart",
    kind="encoder-decoder",
    block_prefix="model.encoder.layers.",
    optional_prefix="model.",
    halves=Halves(
        encoder="model.encoder",
        decoder="model.decoder",
        decoder_prefix="model.decoder.layers.",
        decoder_linears={**_BART_SELF, **_bart_attention("encoder_attn", ENCODER_OUTPUT), **_BART_MLP},
        decoder_entry=(
            "model.decoder.embed_positions.weight",
            "model.decoder.layernorm_embedding.weight",
            "model.decoder.layernorm_embedding.bias",
        ),
    ),
    embedding=(
        "model.shared.weight",
        "model.encoder.embed_positions.weight",
        "model.encoder.layernorm_embedding.weight",
        "model.encoder.layernorm_embedding.bias",
    ),
    final=(),
    score_head=None,
    ignored=("coder.embed_tokens.weight", "final_logits_bias", "coder.version"),
    stored_buffers=("final_logits_bias",),
    entry_sums=("model.encoder.embed_positions", "model.decoder.embed_positions"),
    linears={**_BART_SELF, **_BART_MLP},
    refused_methods=_NOT_IN_TWO_HALVES,
    config_keys={
        "blocks": ("encoder_layers",),
        "decoder_blocks": ("decoder_layers",),
        "hidden": ("d_model",),
        "inner": ("encoder_ffn_dim", "decoder_ffn_dim"),
        "heads": ("encoder_attention_heads",),
        "kv_heads": (),
        "head_dim": (),
        "positions": ("max_position_embeddings",),
        "vocab": ("vocab_size",),
    },
    size_defaults={**SIZE_DEFAULTS, "decoder_blocks": "blocks"},
    fix_sizes=_add_decoder_blocks,
    is_tied_by_default=True,
    norm="layer",
    is_gated=False,
    activation_keys=("activation_function",),
    activation_default="gelu",
)

ENCODER_FAMILIES = (_BERT, _ROBERTA, _T5, _BART)
