"""Tiny random models of every family, with what each family's ``forward`` does to embeddings, masks and heads set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from partitioner.model import ModelTable, describe_model
from plutino.families import family_of
from plutino.safetensors_index import read_safetensors_headers

NUM_BLOCKS, VOCAB = 4, 61

_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_SLIDING_AND_FULL = ["sliding_attention", "full_attention"] * (NUM_BLOCKS // 2)

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _LLAMA),
    # Reads the block's global index in its constructor, so it breaks if blocks are renumbered.
    "gpt2": (
        "gpt2",
        {"n_embd": 32, "n_head": 4, "n_positions": 64, "scale_attn_by_inverse_layer_idx": True},
    ),
    "qwen2": (
        "qwen2",
        _LLAMA | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2, "tie_word_embeddings": True},
    ),
    "qwen3": ("qwen3", _LLAMA | {"head_dim": 12}),
    "qwen3_moe": (
        "qwen3_moe",
        _LLAMA
        | {
            "head_dim": 12,
            "num_experts": 11,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "norm_topk_prob": True,
            "mlp_only_layers": [2],
        },
    ),
    "mistral": ("mistral", _LLAMA | {"sliding_window": 5}),
    "gemma2": (
        "gemma2",
        _LLAMA
        | {
            "head_dim": 12,
            "query_pre_attn_scalar": 12,
            "sliding_window": 5,
            "layer_types": _SLIDING_AND_FULL,
            # Low enough that both bend what they cap.
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3_text": (
        "gemma3_text",
        _LLAMA
        | {
            "head_dim": 12,
            "query_pre_attn_scalar": 12,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
            "final_logit_softcapping": 3.0,
        },
    ),
    "phi3": (
        "phi3",
        _LLAMA
        | {
            "sliding_window": 6,
            "original_max_position_embeddings": 64,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        },
    ),
    "gpt_neox": (
        "gpt_neox",
        {
            "hidden_size": 32,
            "intermediate_size": 128,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "rotary_pct": 0.25,
        },
    ),
    "gpt_neox_sequential": (
        "gpt_neox",
        {
            "hidden_size": 32,
            "intermediate_size": 128,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "use_parallel_residual": False,
            "tie_word_embeddings": True,
        },
    ),
    "opt": (
        "opt",
        {"hidden_size": 32, "ffn_dim": 128, "num_attention_heads": 4, "max_position_embeddings": 64},
    ),
    # The shape of opt-350m: narrower embeddings with a projection at both ends, norms after, no final norm.
    "opt_projected": (
        "opt",
        {
            "hidden_size": 32,
            "word_embed_proj_dim": 20,
            "ffn_dim": 128,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "do_layer_norm_before": False,
        },
    ),
    # 40b: grouped keys, two norms beside each other.
    "falcon": (
        "falcon",
        {
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "new_decoder_architecture": True,
            "tie_word_embeddings": False,
        },
    ),
    # 7b: one key head, one norm for attention and MLP.
    "falcon_multi_query": ("falcon", {"hidden_size": 32, "num_attention_heads": 4}),
    # rw-1b: ALiBi, MLP after attention, biases.
    "falcon_alibi": (
        "falcon",
        {
            "hidden_size": 32,
            "num_attention_heads": 4,
            "alibi": True,
            "multi_query": False,
            "parallel_attn": False,
            "bias": True,
        },
    ),
    "bloom": ("bloom", {"hidden_size": 32, "n_head": 4}),
    "olmo2": ("olmo2", _LLAMA),
    "granite": (
        "granite",
        _LLAMA
        | {
            "embedding_multiplier": 12.0,
            "logits_scaling": 8.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.35,
            "tie_word_embeddings": True,
        },
    ),
    "smollm3": ("smollm3", _LLAMA | {"no_rope_layers": [1, 0, 1, 0], "tie_word_embeddings": True}),
}
"""Model name -> model type and configuration; a family's variants carry its name first."""

_BERT = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "max_position_embeddings": 64}

ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", _BERT),
    # Padding's id is also the position of padding.
    "roberta": ("roberta", _BERT | {"pad_token_id": 1, "bos_token_id": 0, "type_vocab_size": 1}),
}
"""The same for families that score sequences and predict no tokens."""


_T5 = {
    "d_model": 32,
    "d_ff": 48,
    "num_heads": 4,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "decoder_start_token_id": 0,
    # Few and near, so that rows of nine tokens reach the shared last bucket.
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 8,
}

ENCODER_DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("t5", _T5 | {"d_kv": 8}),
    # 1.1: a gate, outputs that are not scaled, heads that are wider than their share.
    "t5_gated": ("t5", _T5 | {"d_kv": 12, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "bart": (
        "bart",
        {
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "max_position_embeddings": 64,
            "scale_embedding": True,
            "decoder_start_token_id": 2,
            "forced_eos_token_id": None,
            "pad_token_id": 1,
            "bos_token_id": 0,
        },
    ),
}
"""The same for families that read one text and write another."""


def make_config(name: str, **changes: Any) -> Any:
    """The transformers configuration of a tiny model."""
    model_type, values = (CONFIGS | ENCODERS | ENCODER_DECODERS)[name]
    blocks = {} if name in ENCODER_DECODERS else {"num_hidden_layers": NUM_BLOCKS}
    common = {"vocab_size": VOCAB, **blocks, "pad_token_id": 0, "bos_token_id": 1}
    return CONFIG_MAPPING[model_type](**(common | {"eos_token_id": None} | values | changes))


def class_of(name: str) -> Any:
    """transformers' own class for what the model is trained to do."""
    if name in ENCODER_DECODERS:
        return AutoModelForSeq2SeqLM
    return AutoModelForSequenceClassification if name in ENCODERS else AutoModelForCausalLM


def make_model(name: str, **changes: Any) -> PreTrainedModel:
    """A tiny model whose every parameter matters: norms, biases and attention far from where training starts."""
    torch.manual_seed(0)
    model = class_of(name).from_config(make_config(name, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def save_model(name: str, folder: Path, **changes: Any) -> Path:
    """Save a tiny model in the layout that transformers publishes."""
    make_model(name, **changes).save_pretrained(folder)
    return folder


def describe_folder(folder: Path) -> ModelTable:
    """What the planner makes of a saved model."""
    config = json.loads((folder / "config.json").read_text())
    shapes = {name: entry.shape for name, entry in read_safetensors_headers(folder).items()}
    return describe_model(config, shapes, family_of(config["model_type"]))
