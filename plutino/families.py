"""Model families: what plutino knows of each beyond what transformers does, as values without torch.

To add a family: one entry in :data:`FAMILIES`, one line in ``docs/ref-families.md``, a tiny configuration in
``tests/numerics/tiny_families.py``. The model's own ``forward`` does masks, rotary embeddings, attention variants and
the head; an entry says how its tensors are called, what ``forward`` does to embeddings that a later stage must not
repeat, how large its parts are, and what its blocks keep for the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from plutino.errors import ModelError


class LinearRule(NamedTuple):
    """One linear layer of a block; sizes are sums such as "query+2key" of the names in :attr:`Family.config_keys`."""

    in_features: str
    out_features: str
    reads: str
    """The tensor it reads: linears with the same one share a copy of it for the backward pass."""


ATTENTION_OUTPUT = "attention output"
"""What every family's output projection reads; attention itself keeps it."""
MLP_INNER = "mlp inner"
"""What the last layer of an MLP reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One family, under the names of its transformers class."""

    model_type: str

    # ---- names of tensors ----
    block_prefix: str
    """A block's tensors start with this and the block's index."""
    optional_prefix: str
    """Published checkpoints may lack this prefix (a base model's own save)."""
    embedding: tuple[str, ...]
    """Tensors of the first stage; the first one is the token embedding that a tied head shares."""
    optional_embedding: tuple[str, ...] = ()
    """Tensors of the first stage that only some of the family's models have."""
    final: tuple[str, ...]
    """Prefixes of the tensors between the last block and the head."""
    head: str = "lm_head.weight"
    """The output head's weight; absent from the checkpoint where it is tied."""
    renamed: Mapping[str, str] | None = None
    """Name in published checkpoints -> name in the transformers class. For sizes; transformers itself renames."""
    merged: Mapping[str, tuple[str, ...]] | None = None
    """Parameter in a block -> endings of the tensors, stored one expert each, that transformers merges into it."""
    ignored: tuple[str, ...] = ()
    """Endings of tensors that old checkpoints carry and the model recomputes."""

    # ---- what forward does ----
    entry_sums: tuple[str, ...] = ()
    """Modules whose output ``forward`` adds to the embeddings: later stages must not add it a second time."""
    entry_factors: tuple[str, ...] = ()
    """Attributes by which ``forward`` multiplies the embeddings: 1 on later stages."""
    per_block_config: tuple[str, ...] = ("layer_types",)
    """Config fields that are lists with one entry per block."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """transformers' attention backend; eager where it has no other for the family."""
    adds_alibi: Callable[[Mapping[str, Any]], bool] | None = None
    """Whether a config.json asks for attention biases that grow with the distance (Press et al. 2022,
    arXiv:2108.12409); None: never. transformers makes them from a padding mask, so that rows cannot be packed."""
    has_conv1d: bool = False
    """Linear layers are transformers' Conv1D: weights [in, out] instead of [out, in]."""

    # ---- sizes ----
    linears: Mapping[str, LinearRule]
    """Linear layers that a method may adapt, by their names in a block. Routers of experts are never among them."""
    untargetable: Mapping[str, str] | None = None
    """Last part of a name -> why no method can adapt what it names."""
    config_keys: Mapping[str, tuple[str, ...]]
    """Size -> keys of config.json that give it; the first that is there counts."""
    size_defaults: Mapping[str, int | str]
    """Size -> number, or sum of other sizes, where config.json is silent, as in the transformers class."""
    fix_sizes: Callable[[Mapping[str, Any], dict[str, int]], None] | None = None
    """What of the sizes follows from other settings."""
    is_tied_by_default: bool = False
    has_score_class: bool = True
    """transformers has the family's ``*ForSequenceClassification``."""

    # ---- what a block keeps for the backward pass ----
    norm: Literal["rms", "layer"] = "rms"
    num_norms: int = 2
    """Norms of hidden size in a block."""
    qk_norm: Literal["none", "head", "whole"] = "none"
    """Norms of queries and keys: none, of each head, or of all heads together."""
    is_gated: bool = True
    """The MLP multiplies an activation with a second projection."""
    activation_keys: tuple[str, ...] = ("hidden_act",)
    activation_default: str = "silu"
    norm_adds_one: bool = False
    """Norms multiply by one plus their weight, and keep the sum."""
    has_soft_caps: bool = False
    """Logits pass through a tanh, and so do attention's scores where the backend is eager (Gemma 2,
    arXiv:2408.00118)."""
    broadcasts_keys: bool = False
    """Fewer key heads than query heads reach sdpa as they are, for which torch has no kernel that is sparing of
    memory."""
    keeps_fused_qkv: bool = False
    """Values stay a view of the fused projection's output, which is thereby kept whole beside rotated queries and
    keys."""

    def sublayer_outputs(self, reads: Iterable[str]) -> tuple[str, ...]:
        """Linear layers of a block, by name, whose output goes to the hidden states.

        Args:
            reads: whose: ATTENTION_OUTPUT, MLP_INNER. A family without such a layer, or where no method can adapt it,
                has none.
        """
        wanted = frozenset(reads)
        return tuple(name for name, rule in self.linears.items() if rule.reads in wanted)

    def why_untargetable(self, targets: Iterable[str]) -> str:
        """The end of a sentence that says why no method can adapt some of these names; empty if nothing is known."""
        known = self.untargetable or {}
        reasons = {target: known[last] for target in targets if (last := target.rpartition(".")[2]) in known}
        return "".join(f": {target} is refused because {why}" for target, why in reasons.items())


_SIZE_KEYS: Mapping[str, tuple[str, ...]] = {
    "blocks": ("num_hidden_layers",),
    "hidden": ("hidden_size",),
    "inner": ("intermediate_size",),
    "heads": ("num_attention_heads",),
    "kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "positions": ("max_position_embeddings",),
    "vocab": ("vocab_size",),
}
_SIZE_DEFAULTS: Mapping[str, int | str] = {"kv_heads": "heads"}

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
    config_keys=_SIZE_KEYS,
    size_defaults=_SIZE_DEFAULTS,
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
        **_SIZE_KEYS,
        "blocks": ("n_layer",),
        "hidden": ("n_embd",),
        "inner": ("n_inner",),
        "heads": ("n_head",),
        "positions": ("n_positions",),
    },
    size_defaults={**_SIZE_DEFAULTS, "inner": "4hidden"},
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
    size_defaults={**_SIZE_DEFAULTS, "head_dim": 256},
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
        **_SIZE_KEYS,
        "blocks": ("num_hidden_layers", "n_layer"),
        "hidden": ("n_embed", "hidden_size"),
        "inner": (),
        "heads": ("num_attention_heads", "n_head"),
        "kv_heads": (),
        "positions": ("seq_length",),
    },
    size_defaults={**_SIZE_DEFAULTS, "inner": "4hidden", "positions": 2048},
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
    replace(_LLAMA, model_type="qwen3", size_defaults={**_SIZE_DEFAULTS, "head_dim": 128}, qk_norm="head"),
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
            **_SIZE_KEYS,
            "expert_inner": ("moe_intermediate_size",),
            "experts_per_token": ("num_experts_per_tok",),
            "experts": ("num_experts", "num_local_experts"),
        },
        size_defaults={**_SIZE_DEFAULTS, "expert_inner": 768, "experts_per_token": 8, "experts": 128},
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
        config_keys={**_SIZE_KEYS, "kv_heads": (), "head_dim": ()},
        size_defaults=_SIZE_DEFAULTS,
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
            **_SIZE_KEYS,
            "inner": ("ffn_dim",),
            "kv_heads": (),
            "head_dim": (),
            "embedding": ("word_embed_proj_dim",),
        },
        size_defaults=_SIZE_DEFAULTS,
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
            **_SIZE_KEYS,
            "hidden": ("n_embed", "hidden_size"),
            "inner": ("ffn_hidden_size",),
            "kv_heads": ("num_kv_heads",),
            "head_dim": (),
        },
        size_defaults={**_SIZE_DEFAULTS, "inner": "4hidden", "positions": 2048},
        fix_sizes=_fix_falcon_sizes,
        activation_keys=("activation",),
        activation_default="gelu",
        broadcasts_keys=True,
        keeps_fused_qkv=True,
    ),
    _BLOOM,
    replace(_LLAMA, model_type="olmo2", qk_norm="whole"),
    replace(_LLAMA, model_type="granite", entry_factors=("model.embedding_multiplier",), has_score_class=False),
    replace(_LLAMA, model_type="smollm3", is_tied_by_default=True),
)

FAMILIES: Mapping[str, Family] = {family.model_type: family for family in _ALL}


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
