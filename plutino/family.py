"""What plutino knows of a model family beyond what transformers does, as a value without torch.

The model's own ``forward`` does masks, rotary embeddings, attention variants and the head; an entry says how its
tensors are called, what ``forward`` does to embeddings that a later stage must not repeat, how large its parts are, and
what its blocks keep for the backward pass. The entries are in ``plutino.families``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from plutino.errors import ConfigError
from plutino.job.objective import ObjectiveConfig


class LinearRule(NamedTuple):
    """One linear layer of a block; sizes are sums such as "query+2key" of the names in :attr:`Family.config_keys`."""

    in_features: str
    out_features: str
    reads: str
    """The tensor it reads: linears with the same one share a copy of it for the backward pass."""


ATTENTION_OUTPUT = "attention output"
"""What every family's output projection reads; attention itself keeps it."""
ENCODER_OUTPUT = "encoder output"
"""What keys and values of a decoder's cross-attention are made of, the same tensor in every block."""
MLP_INNER = "mlp inner"
"""What the last layer of an MLP reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreHead:
    """The head of a family's ``*ForSequenceClassification``, which is trained beside whatever a method trains."""

    module: str
    """Its name there; peft saves it whole."""
    layers: tuple[str, ...]
    """Its linear layers by their names in it, a tanh between each two; the empty name is the module itself."""
    has_bias: bool
    reads: Literal["last token", "first token"]
    """Whose hidden states it gets."""
    pooler: str = ""
    """Module of the base model that they pass before."""


LAST_TOKEN_SCORE = ScoreHead(module="score", layers=("",), has_bias=False, reads="last token")
"""What transformers puts on decoders."""

Kind = Literal["decoder", "encoder", "encoder-decoder"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Halves:
    """What an encoder-decoder has that other models do not. Its blocks are counted through: the decoder's come last."""

    encoder: str
    """The module of the encoder, by its global name."""
    decoder: str
    decoder_prefix: str
    """A decoder's block's tensors start with this and its index among them."""
    decoder_linears: Mapping[str, LinearRule]
    """As :attr:`Family.linears`, which are those of the encoder's blocks."""
    encoder_final: tuple[str, ...] = ()
    """Prefixes of the tensors behind the encoder's last block."""
    decoder_entry: tuple[str, ...] = ()
    """Tensors before the decoder's first block."""
    table: str = ""
    """Tensor in the first block of either half that all blocks of that half use: every stage holds it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One family, under the names of its transformers class."""

    model_type: str
    kind: Kind = "decoder"

    # ---- names of tensors ----
    block_prefix: str
    """A block's tensors start with this and the block's index."""
    halves: Halves | None = None
    """Of encoder-decoders."""
    optional_prefix: str
    """Published checkpoints may lack this prefix (a base model's own save)."""
    embedding: tuple[str, ...]
    """Tensors of the first stage; the first one is the token embedding that a tied head shares."""
    optional_embedding: tuple[str, ...] = ()
    """Tensors of the first stage that only some of the family's models have."""
    final: tuple[str, ...]
    """Prefixes of the tensors between the last block and the head."""
    head: str = "lm_head.weight"
    """The output head's weight; absent from the checkpoint where it is tied. Empty: the model has none, and is trained
    with a score head."""
    score_head: ScoreHead | None = LAST_TOKEN_SCORE
    """None: transformers has no ``*ForSequenceClassification`` of the family."""
    renamed: Mapping[str, str] | None = None
    """Ending of names in published checkpoints -> that in the transformers class. For sizes; transformers itself
    renames."""
    merged: Mapping[str, tuple[str, ...]] | None = None
    """Parameter in a block -> endings of the tensors, stored one expert each, that transformers merges into it."""
    ignored: tuple[str, ...] = ()
    """Endings of tensors that old checkpoints carry and the model recomputes."""

    # ---- what forward does ----
    stored_buffers: tuple[str, ...] = ()
    """Buffers of the last stage that a checkpoint may hold; zero where it does not."""
    entry_sums: tuple[str, ...] = ()
    """Modules whose output ``forward`` adds to the embeddings: later stages must not add it a second time."""
    entry_modules: tuple[str, ...] = ()
    """Modules that make the first block's input of the token embeddings: later stages hand their input on."""
    positions_after_pad: bool = False
    """Positions count from one above the pad token's id, which is the position of padding itself."""
    has_token_types: bool = False
    """Embeddings tell the tokens of a row's first text from those of its second."""
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
    refused_methods: Mapping[str, str] = field(default_factory=dict)
    """Method -> why it is not done for the family, and what to take instead."""
    optional_linears: frozenset[str] = frozenset()
    """Those that only some of the family's models have."""
    named_elsewhere: tuple[str, ...] = ()
    """Last parts of names that linear layers outside of the blocks have too: peft is told what stands before it."""
    untargetable: Mapping[str, str] | None = None
    """Last part of a name -> why no method can adapt what it names."""
    config_keys: Mapping[str, tuple[str, ...]]
    """Size -> keys of config.json that give it; the first that is there counts."""
    size_defaults: Mapping[str, int | str]
    """Size -> number, or sum of other sizes, where config.json is silent, as in the transformers class."""
    fix_sizes: Callable[[Mapping[str, Any], dict[str, int]], None] | None = None
    """What of the sizes follows from other settings."""
    is_tied_by_default: bool = False
    always_tied: bool = False
    """Whatever config.json says, which then means something else."""

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
    norm_keeps_input: bool = False
    """Beside its fp32 copy, where the compute dtype is another."""
    biases_heads: bool = False
    """Every head adds biases of its own to its scores, which become one mask a block with those of padding."""
    has_soft_caps: bool = False
    """Logits pass through a tanh, and so do attention's scores where the backend is eager (Gemma 2,
    arXiv:2408.00118)."""
    broadcasts_keys: bool = False
    """Fewer key heads than query heads reach sdpa as they are, for which torch has no kernel that is sparing of
    memory."""
    keeps_fused_qkv: bool = False
    """Values stay a view of the fused projection's output, which is thereby kept whole beside rotated queries and
    keys."""

    def refuse_method(self, method_type: str) -> None:
        """Raise where a method is not done for the family.

        Raises:
            ConfigError: it is not.
        """
        if method_type in self.refused_methods:
            raise ConfigError(
                f"method.type: {method_type} is not done for {self.model_type}: {self.refused_methods[method_type]}"
            )

    def refuse_objective(self, objective: ObjectiveConfig) -> None:
        """Raise where the family's models cannot do what an objective asks.

        Raises:
            ConfigError: with the objectives that they can be trained for.
        """
        writes, scores = objective.type == "seq2seq", objective.has_score_head
        if self.kind == "encoder-decoder" and not writes:
            raise ConfigError(
                f"{self.model_type} reads one text and writes another, which objective.type: {objective.type} has no "
                "use for; set objective.type: seq2seq, or use another base model"
            )
        if self.kind == "encoder" and not scores:
            raise ConfigError(
                f"{self.model_type} reads texts and predicts no next token, which objective.type: {objective.type} "
                "would train; use classification or regression, or another base model"
            )
        if self.kind == "decoder" and writes:
            raise ConfigError(
                f"{self.model_type} has no encoder, which objective.type: seq2seq trains; set objective.type: sft"
            )
        if scores and self.score_head is None:
            raise ConfigError(
                f"transformers has no sequence classification for {self.model_type}, so nobody could load the "
                "result; choose another base model"
            )

    def is_tied(self, config: Mapping[str, Any]) -> bool:
        """Whether head and token embedding are one parameter, by the values of config.json."""
        said = True if self.always_tied else config.get("tie_word_embeddings")
        return bool(self.head) and bool(self.is_tied_by_default if said is None else said)

    def has_own_head(self, config: Mapping[str, Any], stored: Collection[str]) -> bool:
        """Whether a checkpoint of a family that ties by default holds a head of its own, as T5 1.1's do.

        Args:
            config: values of config.json.
            stored: names of the checkpoint's tensors.
        """
        said_so = self.always_tied and config.get("tie_word_embeddings") is False
        return said_so and self.head in stored and self.embedding[0] in stored

    def num_encoder_blocks(self, config: Mapping[str, Any]) -> int:
        """Blocks of an encoder-decoder's encoder, by the values of config.json; 0 for other models."""
        return int(_first(config, self.config_keys["blocks"])) if self.halves is not None else 0

    def num_blocks(self, config: Mapping[str, Any]) -> int:
        """All blocks, by the values of config.json."""
        if self.halves is None:
            return int(_first(config, self.config_keys["blocks"]))
        num_encoder_blocks = self.num_encoder_blocks(config)
        num_decoder_blocks = _first(config, self.config_keys["decoder_blocks"])
        return num_encoder_blocks + int(num_encoder_blocks if num_decoder_blocks is None else num_decoder_blocks)

    def block_name(self, block: int, num_encoder_blocks: int) -> str:
        """The global name of a block, which in an encoder-decoder is counted anew in the decoder."""
        if self.halves is None or block < num_encoder_blocks:
            return f"{self.block_prefix}{block}"
        return f"{self.halves.decoder_prefix}{block - num_encoder_blocks}"

    def in_block(self, name: str) -> str | None:
        """A module's or tensor's name inside its block; None: it is in none."""
        for prefix in (self.block_prefix, *([] if self.halves is None else [self.halves.decoder_prefix])):
            index, dot, rest = name.removeprefix(prefix).partition(".")
            if name.startswith(prefix) and dot and index.isdecimal():
                return rest
        return None

    @property
    def all_linears(self) -> Mapping[str, LinearRule]:
        """Linear layers of any block, by their names in it."""
        return {**self.linears, **({} if self.halves is None else self.halves.decoder_linears)}

    def target_name(self, linear: str) -> str:
        """The last part of a linear layer's name, by which peft finds it; with the part before, where that means it."""
        parts = linear.split(".")
        return ".".join(parts[-2:]) if parts[-1] in self.named_elsewhere else parts[-1]

    def sublayer_outputs(self, reads: Iterable[str], *, in_decoder: bool = False) -> tuple[str, ...]:
        """Linear layers of a block, by name, whose output goes to the hidden states.

        Args:
            reads: whose: ATTENTION_OUTPUT, MLP_INNER. A family without such a layer, or where no method can adapt it,
                has none.
            in_decoder: of a block of an encoder-decoder's decoder, which has two attentions.
        """
        wanted = frozenset(reads)
        linears = self.halves.decoder_linears if in_decoder and self.halves is not None else self.linears
        return tuple(name for name, rule in linears.items() if rule.reads in wanted)

    def why_untargetable(self, targets: Iterable[str]) -> str:
        """The end of a sentence that says why no method can adapt some of these names; empty if nothing is known."""
        known = self.untargetable or {}
        reasons = {target: known[last] for target in targets if (last := target.rpartition(".")[2]) in known}
        return "".join(f": {target} is refused because {why}" for target, why in reasons.items())


def _first(config: Mapping[str, Any], keys: Iterable[str]) -> Any:
    return next((config[key] for key in keys if config.get(key) is not None), None)


SIZE_KEYS: Mapping[str, tuple[str, ...]] = {
    "blocks": ("num_hidden_layers",),
    "hidden": ("hidden_size",),
    "inner": ("intermediate_size",),
    "heads": ("num_attention_heads",),
    "kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "positions": ("max_position_embeddings",),
    "vocab": ("vocab_size",),
}
"""Most families' :attr:`Family.config_keys`."""
SIZE_DEFAULTS: Mapping[str, int | str] = {"kv_heads": "heads"}
"""Most families' :attr:`Family.size_defaults`."""
