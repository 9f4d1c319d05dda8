"""Entries of families with an encoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from plutino.family import ATTENTION_OUTPUT, MLP_INNER, SIZE_DEFAULTS, SIZE_KEYS, Family, LinearRule, ScoreHead

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
        "parallel_adapters": "its side blocks would have to see both ways; use adapters",
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

ENCODER_FAMILIES = (_BERT, _ROBERTA)
