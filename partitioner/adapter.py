"""How many parameters a method would add to each block, without building it.

Entry point: :func:`adapter_params_of`; :data:`_SIZES` has a function for each method. That of LoRA follows peft's own
matching rules (peft 0.21: ``check_target_module_exists``, ``get_pattern_key``,
``modules_to_save``), because the plan's memory must be that of the modules peft will create.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from partitioner.model import LinearShape, ModelTable
from partitioner.values import PlanValue
from plutino.errors import ConfigError
from plutino.families import ATTENTION_OUTPUT, MLP_INNER, family_of
from plutino.job.blocks import chosen_blocks
from plutino.job.method import (
    AdaptersConfig,
    FullConfig,
    KeyValuesPart,
    LoraConfig,
    MethodConfig,
    ParallelAdaptersConfig,
    PrefixConfig,
    PromptConfig,
    PTuningV2Config,
)
from plutino.side_layout import check_reduction, followed_blocks


class BlockAdapter(PlanValue):
    """What a method adds to one block."""

    params: int
    """Trainable parameters."""
    rank_sum: int
    """Numbers a token that the method's own layers keep for the backward pass: with LoRA the sum of the ranks."""
    cast_params: int = 0
    """Trained numbers of which the backward pass keeps a copy in a narrower compute dtype, a micro-batch each."""
    kept_numbers: int = 0
    """fp32 numbers that the method keeps for the backward pass, a micro-batch each, however long the rows are."""
    linears: tuple[str, ...]
    """Dotted names, inside the block, of the linears whose input is kept for the method's sake."""


class AdapterTable(PlanValue):
    """What a method adds to a model; the fields of a JobShape come from here."""

    blocks: tuple[BlockAdapter, ...]
    first_params: int
    """Trainable parameters of the embedding, or before it."""
    last_params: int
    """Trainable parameters of the head."""
    stage_params: int = 0
    """Trainable parameters that all blocks use: every stage holds them."""
    tied_params: int = 0
    """Trainable parameters that embedding and head share: first and last stage hold them both."""
    past_tokens: int = 0
    """Virtual tokens whose keys and values stand before each row in every block."""
    trains_weights: bool = False
    use_dora: bool = False
    size_setting: str
    """The setting that all of them grow with."""
    side_reduction: int = 0
    """See :attr:`partitioner.model.JobShape.side_reduction`."""
    side_has_whole_heads: bool = False
    prunes_by_gradients: bool = False

    @property
    def num_params(self) -> int:
        """All trainable parameters, each counted once."""
        ends = self.first_params + self.last_params - self.tied_params
        return sum(block.params for block in self.blocks) + ends + self.stage_params

    @property
    def shape_fields(self) -> dict[str, Any]:
        """The fields of :class:`partitioner.model.JobShape` that a method decides, by name."""
        return {
            "adapter_params": tuple(block.params for block in self.blocks),
            "adapter_rank_out": tuple(block.rank_sum for block in self.blocks),
            "adapter_cast_params": tuple(block.cast_params for block in self.blocks),
            "adapter_kept_numbers": tuple(block.kept_numbers for block in self.blocks),
            "trains_weights": self.trains_weights,
            "past_tokens": self.past_tokens,
            "adapted_linears": tuple(block.linears for block in self.blocks),
            "first_trainable_params": self.first_params,
            "last_trainable_params": self.last_params,
            "stage_trainable_params": self.stage_params,
            "use_dora": self.use_dora,
            "size_setting": self.size_setting,
            "side_reduction": self.side_reduction,
            "side_has_whole_heads": self.side_has_whole_heads,
            "prunes_by_gradients": self.prunes_by_gradients,
        }


def adapter_params_of(table: ModelTable, method: MethodConfig) -> AdapterTable:
    """Sizes of what the method would train on the whole model.

    Raises:
        ConfigError: a setting names what the model does not have, or nothing at all would be trained.
    """
    family_of(table.family).refuse_method(method.type)
    adapter = _SIZES[method.type](table, method)
    if adapter.num_params == 0:
        raise ConfigError("the method would train 0 parameters; set method.target_modules or method.blocks")
    return adapter


def _lora(table: ModelTable, method: LoraConfig) -> AdapterTable:
    """Parameters as peft creates them.

    A linear of shape in x out gets rank * (in + out) of them (Hu et al. 2021, arXiv:2106.09685), with DoRA one
    magnitude more for each of its outputs (Liu et al. 2024, arXiv:2402.09353).
    """
    chosen = chosen_blocks(method.blocks, table.num_blocks)
    bare = BlockAdapter(params=0, rank_sum=0, linears=())
    blocks = tuple(
        _block_adapter(table, method, index) if index in chosen else bare for index in range(table.num_blocks)
    )
    _check_targets(table, method)
    first_params, last_params = _outer_params(table, method)
    return AdapterTable(
        blocks=blocks,
        first_params=first_params,
        last_params=last_params,
        tied_params=last_params if method.ensure_weight_tying and table.is_tied else 0,
        use_dora=method.use_dora,
        size_setting=method.size_setting,
    )


def _adapters(table: ModelTable, method: AdaptersConfig) -> AdapterTable:
    """One of bottleneck m on hidden size D has 2 D m + D + m parameters (Houlsby et al. 2019, arXiv:1902.00751 2.1)."""
    chosen = chosen_blocks(method.blocks, table.num_blocks)
    reads = (ATTENTION_OUTPUT, MLP_INNER) if method.placement == "houlsby" else (MLP_INNER,)
    family = family_of(table.family)
    for read in reads:
        if not family.sublayer_outputs((read,)):
            raise ConfigError(
                f"method.type: adapters: {table.family} has no layer behind its experts that an adapter could follow; "
                "use method.type: lora"
            )
    hidden, inner = table.hidden_size, method.bottleneck

    def of(block: int) -> BlockAdapter:
        in_decoder = block >= table.num_encoder_blocks > 0
        num = len(family.sublayer_outputs(reads, in_decoder=in_decoder)) if block in chosen else 0
        return BlockAdapter(
            params=num * (2 * hidden * inner + hidden + inner),
            # What down reads, and what it gives before and after the activation.
            rank_sum=num * (hidden + 2 * inner),
            cast_params=num * 2 * hidden * inner,
            linears=(),
        )

    return AdapterTable(
        blocks=tuple(map(of, range(table.num_blocks))),
        first_params=0,
        last_params=0,
        size_setting=method.size_setting,
    )


def _parallel_adapters(table: ModelTable, method: ParallelAdaptersConfig) -> AdapterTable:
    """Side blocks have 1 / k^2 of a block's matrices and 1 / k of its vectors, k = ``reduction``.

    Beside each stand a projection D -> D / k with bias and a gate, below the first one another projection, behind the
    last one the final norm and the projection to what the head reads.
    """
    reduction, hidden = method.reduction, table.hidden_size
    family, has_whole_heads = family_of(table.family), method.heads == "whole"
    sizes = {"hidden": hidden, "head_dim": table.head_dim, "inner": table.intermediate_size}
    check_reduction(family, reduction, sizes | {"kv_heads": table.num_kv_heads}, has_whole_heads=has_whole_heads)
    # Norms of single heads are as wide as these.
    kept = 2 * (table.head_dim - table.head_dim // reduction) if has_whole_heads and family.qk_norm == "head" else 0
    num_encoder_blocks = table.num_encoder_blocks
    chosen = followed_blocks(method.blocks, table.num_blocks, num_encoder_blocks)
    # The side state of an encoder-decoder's target starts beside its decoder.
    entries = {chosen[0], next(block for block in chosen if block >= num_encoder_blocks)}
    projection = hidden // reduction * (hidden + 1)
    blocks = []
    for index in range(table.num_blocks):
        matrices = sum(linear.in_features * linear.out_features for linear in table.block_linears[index])
        side_block = matrices // reduction**2 + _vector_params(table, index) // reduction + kept + table.repeated_params
        params = side_block + projection + 1 + (projection if index in entries else 0)
        blocks.append(BlockAdapter(params=params if index in chosen else 0, rank_sum=0, linears=()))
    out_width = table.head_params // table.vocab_size or hidden
    # Where the head reads another width, what stands before it is a projection and no norm; an encoder has a pooler.
    has_norm = out_width == hidden and table.head_params > 0
    norm_params = table.final_params // reduction if has_norm else 0
    return AdapterTable(
        blocks=tuple(blocks),
        first_params=0,
        last_params=norm_params + out_width * (hidden // reduction + 1),
        size_setting=method.size_setting,
        side_reduction=reduction,
        side_has_whole_heads=has_whole_heads,
        prunes_by_gradients=method.prunes_by_gradients,
    )


def _vector_params(table: ModelTable, index: int) -> int:
    """Parameters of a block that are no matrix of a linear layer, without the biases that a half's blocks share."""

    def of(block: int) -> int:
        matrices = sum(linear.in_features * linear.out_features for linear in table.block_linears[block])
        has_table = table.num_encoder_blocks > 0 and block in (0, table.num_encoder_blocks)
        return table.block_params[block] - matrices - (table.repeated_params if has_table else 0)

    # What stands before a decoder is counted with its first block.
    is_first_of_decoder = index == table.num_encoder_blocks > 0 and index + 1 < table.num_blocks
    return of(index + 1) if is_first_of_decoder else of(index)


def _prompt(table: ModelTable, method: PromptConfig) -> AdapterTable:
    """One embedding a virtual token (Lester et al. 2021, arXiv:2104.08691); the first stage holds them."""
    nothing = BlockAdapter(params=0, rank_sum=0, linears=())
    return AdapterTable(
        blocks=(nothing,) * table.num_blocks,
        first_params=method.num_virtual_tokens * table.hidden_size,
        last_params=0,
        size_setting=method.size_setting,
    )


def _prefix(table: ModelTable, method: PrefixConfig) -> AdapterTable:
    """Keys and values of every block, or the MLP that gives them (Li and Liang 2021, arXiv:2101.00190 4.3)."""
    width, tokens, inner = table.num_kv_heads * table.head_dim, method.num_virtual_tokens, method.encoder_hidden_size
    if not method.projection:
        return _key_values(table, method, params=tokens * 2 * width, kept_numbers=0)
    return _key_values(
        table,
        method,
        params=2 * width * inner + 2 * width,
        # What tanh gives, and the keys and values.
        kept_numbers=tokens * (inner + 2 * width),
        stage_params=tokens * width + width * inner + inner,
    )


def _full(table: ModelTable, method: FullConfig) -> AdapterTable:
    """Everything; a tied embedding is held by first and last stage."""
    family = family_of(table.family)
    # A root-mean-square norm keeps what it multiplies with its weight; others have kept it already.
    norms = table.hidden_size if family.norm == "rms" else 0
    qk_norms = (table.num_heads + table.num_kv_heads) * table.head_dim if family.qk_norm != "none" else 0
    num_encoder_blocks = table.num_encoder_blocks
    half_starts = (0, num_encoder_blocks) if table.repeated_params else ()

    def of(block: int) -> BlockAdapter:
        # A decoder's block has one more, before its second attention, and one stands behind an encoder.
        num_norms = family.num_norms + (num_encoder_blocks - 1 <= block and num_encoder_blocks > 0)
        return BlockAdapter(
            params=table.block_params[block] - (table.repeated_params if block in half_starts else 0),
            rank_sum=num_norms * norms + qk_norms,
            linears=tuple(linear.name for linear in table.block_linears[block]),
        )

    return AdapterTable(
        blocks=tuple(map(of, range(table.num_blocks))),
        # Tables that all blocks of a half use: every stage may hold both.
        stage_params=len(half_starts) * table.repeated_params,
        first_params=table.embedding_params,
        last_params=table.final_params + table.head_params,
        tied_params=table.head_params if table.is_tied else 0,
        trains_weights=True,
        size_setting=method.size_setting,
    )


def _p_tuning_v2(table: ModelTable, method: PTuningV2Config) -> AdapterTable:
    """Keys and values of every block (Liu et al. 2021, arXiv:2110.07602)."""
    params = method.num_virtual_tokens * 2 * table.num_kv_heads * table.head_dim
    # Dropout's result, and its mask of a byte each.
    return _key_values(table, method, params=params, kept_numbers=2 * params if method.dropout else 0)


def _key_values(
    table: ModelTable, method: KeyValuesPart, *, params: int, kept_numbers: int, stage_params: int = 0
) -> AdapterTable:
    cast = method.num_virtual_tokens * 2 * table.num_kv_heads * table.head_dim
    block = BlockAdapter(params=params, rank_sum=0, cast_params=cast, kept_numbers=kept_numbers, linears=())
    return AdapterTable(
        blocks=(block,) * table.num_blocks,
        first_params=0,
        last_params=0,
        stage_params=stage_params,
        past_tokens=method.past_tokens,
        size_setting=method.size_setting,
    )


_SIZES: Mapping[str, Callable[[ModelTable, Any], AdapterTable]] = {
    "adapters": _adapters,
    "full": _full,
    "lora": _lora,
    "p_tuning_v2": _p_tuning_v2,
    "prefix": _prefix,
    "parallel_adapters": _parallel_adapters,
    "prompt": _prompt,
}


def _block_adapter(table: ModelTable, method: LoraConfig, index: int) -> BlockAdapter:
    prefix = f"{family_of(table.family).block_name(index, table.num_encoder_blocks)}."
    params, rank_sum, names = 0, 0, []
    for linear in table.block_linears[index]:
        key = prefix + linear.name
        if not _is_target(key, method):
            continue
        rank = _rank_of(key, method.rank_pattern, method.rank)
        params += rank * (linear.in_features + linear.out_features)
        params += linear.out_features if method.use_dora else 0
        rank_sum += rank
        names.append(linear.name)
    return BlockAdapter(params=params, rank_sum=rank_sum, linears=tuple(names))


def _is_target(key: str, method: LoraConfig) -> bool:
    # peft keeps adapters off whatever is trained in full.
    if any(re.match(rf"(^|.*\.){name}($|\..*)", key) for name in method.modules_to_save):
        return False
    return method.target_modules == "all-linear" or _ends_with_any(key, method.target_modules)


def _ends_with_any(key: str, names: Iterable[str]) -> bool:
    return any(key == name or key.endswith(f".{name}") for name in names)


def _rank_of(key: str, patterns: Mapping[str, int], default: int) -> int:
    """The first matching pattern wins, in the order in which they are written."""
    return next((rank for pattern, rank in patterns.items() if re.match(rf"(.*\.)?({pattern})$", key)), default)


def _check_targets(table: ModelTable, method: LoraConfig) -> None:
    if method.target_modules == "all-linear":
        return
    family = family_of(table.family)
    keys = [
        f"{family.block_name(index, table.num_encoder_blocks)}.{linear.name}"
        for index in range(table.num_blocks)
        for linear in table.block_linears[index]
    ]
    for name in method.target_modules:
        if not any(_ends_with_any(key, (name,)) for key in keys):
            known = ", ".join(sorted({_last(linear) for linears in table.block_linears for linear in linears}))
            raise ConfigError(
                f"method.target_modules: no linear layer is called {name!r}"
                f"{family_of(table.family).why_untargetable((name,))}; this model's blocks have {known} "
                "(head and embedding are trained through method.modules_to_save)"
            )


def _last(linear: LinearShape) -> str:
    return linear.name.rpartition(".")[2]


def _outer_params(table: ModelTable, method: LoraConfig) -> tuple[int, int]:
    """Parameters of embedding and head that are trained in full beside the adapter."""
    family = family_of(table.family)
    embedding_key, head_key = family.embedding[0].removesuffix(".weight"), family.head.removesuffix(".weight")
    wanted = {
        key: any(re.match(rf"(^|.*\.){name}$", key) for name in method.modules_to_save)
        for key in (embedding_key, head_key)
    }
    for name in method.modules_to_save:
        if not any(re.match(rf"(^|.*\.){name}$", key) for key in (embedding_key, head_key)):
            known = " and ".join(key.rpartition(".")[2] for key in (embedding_key, head_key) if key)
            raise ConfigError(f"method.modules_to_save: {name!r} cannot be trained in full; this model has {known}")
    if method.ensure_weight_tying and table.is_tied and any(wanted.values()):
        wanted = dict.fromkeys(wanted, True)
    # The token embedding alone, which has the head's shape: learned positions stay frozen.
    token_params = table.token_params
    return (token_params if wanted[embedding_key] else 0), (table.head_params if wanted[head_key] else 0)
