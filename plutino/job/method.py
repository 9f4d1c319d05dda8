"""How the adapter is parametrised. Field names are those of peft.

What planner and coordinator ask of a method they ask of its config, by the properties of
:class:`plutino.job.method_part.MethodPart`; what it does on a stage stands in ``edge_node/methods``, its sizes in
``partitioner/adapter.py``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from plutino.job.method_part import InBackbonePart, InChosenBlocksPart, MethodPart
from plutino.key_value_layout import Float32Array, block_name, join_blocks, split_blocks


class LoraConfig(InChosenBlocksPart, InBackbonePart):
    """LoRA (Hu et al. 2021, arXiv:2106.09685)."""

    size_setting: ClassVar[str] = "rank"
    saves_score_head: ClassVar[bool] = True

    type: Literal["lora"] = "lora"
    rank: int = Field(8, ge=1, le=4096)
    """Inner dimension R of the update B @ A."""
    alpha: float = Field(16.0, gt=0)
    """The update is scaled by alpha / rank (alpha / sqrt(rank) with rslora)."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the input of A, drawn from (seed, step, micro-batch, name) so that no partition changes it."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Linear layers that get an adapter: names as in the model (q_proj, c_attn, ...), or all of them but the head."""
    rank_pattern: dict[str, int] = Field(default_factory=dict)
    """Another rank for modules whose name matches the key (a regular expression, as in peft)."""
    alpha_pattern: dict[str, float] = Field(default_factory=dict)
    """Another alpha for modules whose name matches the key."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) (Kalajdzievski 2023, arXiv:2312.03732)."""
    use_dora: bool = False
    """Weight-decomposed LoRA (Liu et al. 2024, arXiv:2402.09353)."""
    modules_to_save: tuple[str, ...] = ()
    """Modules outside the blocks trained in full beside LoRA and saved with it: lm_head, embed_tokens (wte)."""
    ensure_weight_tying: bool = False
    """With modules_to_save on a model with tied embeddings: keep head and embedding one parameter, as in peft."""

    @property
    def has_dropout(self) -> bool:
        """See :class:`MethodPart`."""
        return self.dropout > 0

    @property
    def saves_tied_head(self) -> bool:
        """See :class:`MethodPart`."""
        return self.ensure_weight_tying

    @property
    def trains_outer_modules(self) -> bool:
        """See :class:`MethodPart`."""
        return bool(self.modules_to_save)

    @property
    def unpacks_weights(self) -> str:
        """DoRA takes the norm of every adapted weight."""
        return "use_dora" if self.use_dora else ""

    def lowest_trained_block(self, num_blocks: int, embedding_names: Collection[str]) -> int | None:
        """See :class:`MethodPart`."""
        return (
            0 if self._trains_embedding(embedding_names) else super().lowest_trained_block(num_blocks, embedding_names)
        )

    def may_freeze_blocks(self, embedding_names: Collection[str]) -> bool:
        """See :class:`MethodPart`."""
        return super().may_freeze_blocks(embedding_names) and not self._trains_embedding(embedding_names)

    def _trains_embedding(self, embedding_names: Collection[str]) -> bool:
        return self.ensure_weight_tying or bool(set(embedding_names) & set(self.modules_to_save))

    def for_profile(self) -> LoraConfig:
        """LoRA of this rank on all linear layers."""
        return LoraConfig(rank=self.rank)


class AdaptersConfig(InChosenBlocksPart, InBackbonePart):
    """Bottleneck adapters (Houlsby et al. 2019, arXiv:1902.00751; Pfeiffer et al. 2020, arXiv:2005.00247).

    ``y + up(activation(down(y)))``, with y what a sublayer adds to the hidden states.
    """

    size_setting: ClassVar[str] = "bottleneck"
    has_peft_format: ClassVar[bool] = False
    saves_score_head: ClassVar[bool] = True

    type: Literal["adapters"] = "adapters"
    placement: Literal["houlsby", "pfeiffer"] = "pfeiffer"
    """houlsby: behind attention and MLP of each block. pfeiffer: behind the MLP alone."""
    bottleneck: int = Field(64, ge=1, le=65536)
    """Inner dimension of each adapter."""
    activation: Literal["relu", "gelu", "silu", "tanh"] = "relu"
    """Non-linearity between down and up."""

    def for_profile(self) -> AdaptersConfig:
        """The same adapters in all blocks."""
        return self.model_copy(update={"blocks": None})


class ParallelAdaptersConfig(InChosenBlocksPart):
    """PAC's parallel adapters (Ouyang et al. 2024, arXiv:2408.10746): a narrow network beside the frozen model.

    It reads what the model's blocks give and no gradient of it enters them.
    """

    size_setting: ClassVar[str] = "reduction"
    has_peft_format: ClassVar[bool] = False
    saves_score_head: ClassVar[bool] = True

    type: Literal["parallel_adapters"] = "parallel_adapters"
    reduction: int = Field(8, ge=2, le=1024)
    """Every width of the side network is the model's divided by it."""
    heads: Literal["narrow", "whole"] = "narrow"
    """narrow: side blocks have as many heads as the model's, each with its width divided, as PAC has them. whole: each
    head is as wide as the model's, and their number is divided."""
    init: Literal["pruning", "fisher", "random"] = "pruning"
    """Where side blocks start: from the largest weights of the blocks that they follow, from those with the largest
    gradients on the job's first rows, or from random numbers."""

    @property
    def leaves_blocks_alone(self) -> bool:
        """See :class:`MethodPart`."""
        return True

    @property
    def prunes_by_gradients(self) -> bool:
        """See :class:`MethodPart`."""
        return self.init == "fisher"

    def when_restored(self) -> ParallelAdaptersConfig:
        """See :class:`MethodPart`."""
        return self.model_copy(update={"init": "random"})

    def for_profile(self) -> ParallelAdaptersConfig:
        """A side network beside all blocks; where it starts costs no time of a step."""
        return self.model_copy(update={"blocks": None, "init": "pruning" if self.prunes_by_gradients else self.init})


class PromptConfig(MethodPart):
    """Prompt tuning (Lester et al. 2021, arXiv:2104.08691): trained embeddings before each row's own."""

    size_setting: ClassVar[str] = "num_virtual_tokens"

    type: Literal["prompt"] = "prompt"
    num_virtual_tokens: int = Field(20, ge=1, le=4096)
    init: Literal["vocabulary", "random", "text"] = "vocabulary"
    """Starting values: embeddings of tokens drawn from the vocabulary, standard normal numbers, or embeddings of
    init_text, repeated or cut to the number of virtual tokens."""
    init_text: str = ""
    init_token_ids: tuple[int, ...] = ()
    """The ids of init_text; the coordinator fills them in."""

    @model_validator(mode="after")
    def _text_goes_with_init(self) -> PromptConfig:
        if (self.init == "text") != bool(self.init_text.strip()):
            raise ValueError("init: text and init_text go together; give both or neither")
        return self

    @property
    def prompt_tokens(self) -> int:
        """See :class:`MethodPart`."""
        return self.num_virtual_tokens

    @property
    def text(self) -> str:
        """See :class:`MethodPart`."""
        return self.init_text

    def with_text_ids(self, token_ids: tuple[int, ...]) -> PromptConfig:
        """See :class:`MethodPart`."""
        return self.model_copy(update={"init_token_ids": token_ids})

    def for_profile(self) -> PromptConfig:
        """As many virtual tokens, of any value."""
        return PromptConfig(num_virtual_tokens=self.num_virtual_tokens, init="random")


class KeyValuesPart(MethodPart):
    """What deep prompts share: trained keys and values before each row, in every block."""

    size_setting: ClassVar[str] = "num_virtual_tokens"

    num_virtual_tokens: int = Field(20, ge=1, le=4096)
    init: Literal["random", "zero"] = "random"
    """Starting values, as in peft: standard normal (of an MLP: torch's own), or zero. Neither is the base model:
    virtual tokens take their share of attention."""

    @property
    def past_tokens(self) -> int:
        """See :class:`MethodPart`."""
        return self.num_virtual_tokens

    def checkpoint_of(self, parts: Mapping[str, Float32Array]) -> dict[str, Float32Array]:
        """The one tensor that peft has for all blocks."""
        return join_blocks(parts)

    def parts_of(self, checkpoint: Mapping[str, Float32Array], parts: Collection[str]) -> dict[str, Float32Array]:
        """See :class:`MethodPart`."""
        return split_blocks(checkpoint, parts)


class PrefixConfig(KeyValuesPart):
    """Prefix tuning (Li and Liang 2021, arXiv:2101.00190)."""

    type: Literal["prefix"] = "prefix"
    projection: bool = False
    """Whether keys and values come out of a trained MLP (the paper's reparametrisation), which is left behind when the
    adapter is published."""
    encoder_hidden_size: int = Field(512, ge=1, le=65536)
    """Inner dimension of that MLP."""

    @property
    def no_continuation(self) -> str:
        """Of a projected prefix keys and values are published, and not the MLP."""
        if not self.projection:
            return ""
        return (
            "a published prefix holds keys and values, not the MLP they came from; set method.projection: false to go "
            "on with these, or leave init_adapter out"
        )

    def derived_names(self, adapter_config: Mapping[str, Any]) -> tuple[str, ...]:
        """See :class:`MethodPart`."""
        return tuple(map(block_name, range(int(adapter_config["num_layers"])))) if self.projection else ()

    def for_profile(self) -> PrefixConfig:
        """The same prefix."""
        return self


class PTuningV2Config(KeyValuesPart):
    """P-tuning v2 (Liu et al. 2021, arXiv:2110.07602)."""

    saves_score_head: ClassVar[bool] = True

    type: Literal["p_tuning_v2"] = "p_tuning_v2"
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on keys and values, drawn once a micro-batch from (seed, step, micro-batch, block)."""

    def for_profile(self) -> PTuningV2Config:
        """The same prompts."""
        return self


class FullConfig(InBackbonePart):
    """Full fine-tuning: every parameter of the model."""

    size_setting: ClassVar[str] = "type"
    has_peft_format: ClassVar[bool] = False
    trains_weights: ClassVar[bool] = True
    saves_score_head: ClassVar[bool] = True

    type: Literal["full"] = "full"

    @property
    def no_continuation(self) -> str:
        """Its result is a model."""
        return "full has no adapter to start from; set model.path to the model that it published"

    def for_profile(self) -> FullConfig:
        """The same."""
        return self


MethodConfig = Annotated[
    LoraConfig | AdaptersConfig | FullConfig | ParallelAdaptersConfig | PrefixConfig | PromptConfig | PTuningV2Config,
    Field(discriminator="type"),
]
"""Union of all methods' configs, told apart by ``type``."""
