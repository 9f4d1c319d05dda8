"""Side networks as values: which blocks they follow, how narrow they are, and the configuration of their own blocks.

Torch-free: planner, job specs and the module of :mod:`plutino.side_network` read the same rules.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from plutino.errors import ConfigError
from plutino.families import Family
from plutino.job.blocks import chosen_blocks

SIDE_TYPE = "PLUTINO_SIDE_NETWORK"
"""What stands in adapter_config.json where peft's adapters name their ``peft_type``."""

_ONE_VALUE_A_BLOCK = ("no_rope_layers",)
"""Config fields with a value a block that constructors read, beside those of Family.per_block_config."""

_OF_THE_MODEL_ALONE = ("architectures", "transformers_version", "id2label", "label2id", "problem_type")
"""Config fields that say nothing about blocks."""


class SideLayout(BaseModel):
    """Content of adapter_config.json."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    peft_type: Literal["PLUTINO_SIDE_NETWORK"] = "PLUTINO_SIDE_NETWORK"
    task_type: Literal["CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS"] = "CAUSAL_LM"
    modules_to_save: tuple[str, ...] = ()
    """Modules of the model that were trained beside the side network: a score head."""
    base_model_name_or_path: str | None = None
    reduction: int
    """Every width of the side network is the backbone's divided by it."""
    blocks: tuple[int, ...]
    """Blocks of the backbone that a side block follows, ascending."""
    num_blocks: int
    """Blocks of the backbone."""
    num_encoder_blocks: int = 0
    """Those of them that are an encoder-decoder's encoder, the first ones; 0 for other models."""
    width: int
    """Width D of the backbone's hidden states."""
    out_width: int
    """Width of what the backbone's head reads."""
    config: dict[str, Any]
    """config.json of a model of the side blocks alone."""

    @property
    def side_width(self) -> int:
        """Width R of the side state."""
        return self.width // self.reduction

    def own_blocks(self, start_block: int, end_block: int) -> tuple[int, ...]:
        """Blocks of ``[start_block, end_block)`` that a side block follows."""
        return tuple(block for block in self.blocks if start_block <= block < end_block)

    @property
    def encoder_blocks(self) -> tuple[int, ...]:
        """Blocks of an encoder-decoder's encoder that a side block follows."""
        return self.own_blocks(0, self.num_encoder_blocks)

    @property
    def top_blocks(self) -> tuple[int, ...]:
        """Those whose side state reaches the head: an encoder-decoder's decoder's, all of other models."""
        return self.own_blocks(self.num_encoder_blocks, self.num_blocks)

    def stage_config(self, own_blocks: Sequence[int], family: Family) -> dict[str, Any]:
        """Configuration of these side blocks alone; where there are none, of the first one of a single stack."""
        if self.num_encoder_blocks:
            num_of_encoder = sum(block < self.num_encoder_blocks for block in own_blocks)
            return _with_halves(self.config, family, num_of_encoder, len(own_blocks) - num_of_encoder)
        places = [self.blocks.index(block) for block in own_blocks] or [0]
        return _with_blocks(self.config, family, places)


def side_layout(
    values: Mapping[str, Any],
    family: Family,
    *,
    reduction: int,
    blocks: Sequence[int] | str | None,
    sizes: Mapping[str, int],
    out_width: int,
    has_whole_heads: bool = False,
) -> SideLayout:
    """The side network of a model.

    Args:
        values: the model's config.json, as transformers completes it.
        family: the model's family.
        reduction: what the widths are divided by.
        blocks: blocks that a side block follows; None: all.
        sizes: blocks, hidden, heads, kv_heads, head_dim and inner of the model.
        out_width: width of what the head reads.
        has_whole_heads: fewer heads of the model's own width, in place of as many narrow ones.

    Raises:
        ConfigError: the family's blocks cannot be narrowed, by no number or not by this one, or a block does not exist.
    """
    num_blocks, num_encoder_blocks = sizes["blocks"], family.num_encoder_blocks(values)
    chosen = followed_blocks(blocks, num_blocks, num_encoder_blocks)
    check_reduction(family, reduction, sizes, has_whole_heads=has_whole_heads)
    narrow = _narrowed(values, family, reduction, sizes, has_whole_heads=has_whole_heads)
    head_dim = sizes["head_dim"] // (1 if has_whole_heads else reduction)
    for rotated in _rotated_sizes(narrow, head_dim):
        if rotated < 2 or rotated % 2:
            raise ConfigError(
                f"method.reduction: {reduction} leaves heads of {head_dim} numbers, of which {rotated} would be "
                f"rotated by their position; rotation takes pairs: choose a smaller reduction than {reduction}"
            )
    layout = SideLayout(
        task_type="SEQ_2_SEQ_LM" if num_encoder_blocks else "CAUSAL_LM",
        reduction=reduction,
        blocks=chosen,
        num_blocks=num_blocks,
        num_encoder_blocks=num_encoder_blocks,
        width=sizes["hidden"],
        out_width=out_width,
        config=narrow,
    )
    if num_encoder_blocks:
        config = _with_halves(narrow, family, len(layout.encoder_blocks), len(layout.top_blocks))
    else:
        config = _with_blocks(narrow, family, chosen)
    return layout.model_copy(update={"config": config})


def followed_blocks(
    blocks: Sequence[int] | str | None, num_blocks: int, num_encoder_blocks: int = 0
) -> tuple[int, ...]:
    """Blocks that a side block follows, ascending.

    Args:
        blocks: those that were named; None: all.
        num_blocks: of the model.
        num_encoder_blocks: those of them that are an encoder-decoder's encoder.

    Raises:
        ConfigError: a block does not exist, none was named, or none of an encoder-decoder's halves.
    """
    chosen = chosen_blocks(blocks, num_blocks)
    if num_encoder_blocks and not chosen[0] < num_encoder_blocks <= chosen[-1]:
        raise ConfigError(
            f"method.blocks is {list(chosen)}, but what follows the decoder's blocks looks at what follows the "
            f"encoder's: name some of 0 to {num_encoder_blocks - 1} and some of {num_encoder_blocks} to "
            f"{num_blocks - 1}, or leave it out to follow all"
        )
    return chosen


def check_reduction(family: Family, reduction: int, sizes: Mapping[str, int], *, has_whole_heads: bool) -> None:
    """See whether a family's blocks can be narrowed so.

    Args:
        family: of the model.
        reduction: what the widths are divided by.
        sizes: hidden, kv_heads, head_dim and inner of the model.
        has_whole_heads: whether heads become fewer and not narrower.

    Raises:
        ConfigError: they cannot.
    """
    if family.merged:
        raise ConfigError(
            f"method.type: parallel_adapters: {family.model_type} has mixtures of experts, and a narrow copy of its "
            "router would choose others; use method.type: lora"
        )
    if has_whole_heads:
        _check_whole_heads(family)
    heads = "kv_heads" if has_whole_heads else "head_dim"
    parts = {name: sizes[name] for name in ("hidden", heads, "inner")}
    if any(size % reduction for size in parts.values()):
        fitting = [k for k in range(2, parts[heads] + 1) if not any(size % k for size in parts.values())]
        advice = f"choose one of {', '.join(map(str, fitting))}" if fitting else "use method.type: lora"
        raise ConfigError(
            f"method.reduction: {reduction} does not divide hidden size {parts['hidden']}, "
            f"{'number of key heads' if has_whole_heads else 'head size'} {parts[heads]} and inner size "
            f"{parts['inner']} of this model; {advice}"
        )


def _check_whole_heads(family: Family) -> None:
    if family.halves is not None or all(rule.out_features != "query" for rule in family.all_linears.values()):
        why = "has a ladder beside either half" if family.halves is not None else "makes queries and keys in one layer"
        raise ConfigError(f"method.heads: whole is not done for {family.model_type}, which {why}; use heads: narrow")


def _narrowed(
    values: Mapping[str, Any], family: Family, reduction: int, sizes: Mapping[str, int], *, has_whole_heads: bool
) -> dict[str, Any]:
    """The model's configuration with all widths divided; as many heads, each narrower, or fewer heads."""
    narrow = {key: value for key, value in values.items() if key not in _OF_THE_MODEL_ALONE}
    of_heads = ("heads", "kv_heads") if has_whole_heads else ("head_dim",)
    for size in ("hidden", "inner", *of_heads, "embedding"):
        for key in family.config_keys.get(size, ()):
            if narrow.get(key) is not None:
                narrow[key] = sizes["hidden" if size == "embedding" else size] // reduction
    if narrow.get("query_pre_attn_scalar") is not None and not has_whole_heads:
        narrow["query_pre_attn_scalar"] = max(1, round(narrow["query_pre_attn_scalar"] / reduction))
    if narrow.get("attention_multiplier") is not None and not has_whole_heads:
        narrow["attention_multiplier"] = narrow["attention_multiplier"] * reduction**0.5
    if narrow.get("scale_attn_by_inverse_layer_idx"):
        # Side blocks are numbered per stage: a scale by that number would depend on the partition.
        narrow["scale_attn_by_inverse_layer_idx"] = False
    if narrow.get("rope_parameters"):
        narrow["rope_parameters"] = _without_long_rope(narrow["rope_parameters"])
    # No embedding and no head are made of it, and nothing looks at special tokens.
    narrow |= {"vocab_size": 1, "tie_word_embeddings": False, "dtype": "float32"}
    return narrow | dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))


def _without_long_rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings that hold for heads of any size: factors for each of the model's frequencies do not."""
    if "rope_type" not in rope:
        return {kind: _without_long_rope(each) if isinstance(each, Mapping) else each for kind, each in rope.items()}
    if rope["rope_type"] != "longrope":
        return dict(rope)
    return {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope} | {"rope_type": "default"}


def _rotated_sizes(values: Mapping[str, Any], head_dim: int) -> Iterator[int]:
    rope = values.get("rope_parameters") or {}
    for each in [rope] if "rope_type" in rope else rope.values():
        if isinstance(each, Mapping):
            yield int(head_dim * each.get("partial_rotary_factor", 1.0))


def _with_halves(values: Mapping[str, Any], family: Family, num_of_encoder: int, num_of_decoder: int) -> dict[str, Any]:
    """The configuration of so many blocks of either half."""
    numbers = {"blocks": num_of_encoder, "decoder_blocks": num_of_decoder}
    return {**values, **{key: number for size, number in numbers.items() for key in family.config_keys[size]}}


def _with_blocks(values: Mapping[str, Any], family: Family, places: Sequence[int]) -> dict[str, Any]:
    """The configuration of some of its blocks."""
    chosen = dict(values)
    for key in family.config_keys["blocks"]:
        if key in chosen:
            chosen[key] = len(places)
    for key in (*family.per_block_config, *_ONE_VALUE_A_BLOCK):
        if chosen.get(key) is not None:
            chosen[key] = [chosen[key][place] for place in places]
    return chosen
