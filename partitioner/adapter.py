"""How many parameters a method would add to each block, without building it.

Entry point: :func:`adapter_params_of`; :data:`_SIZES` has a function for each method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from partitioner.adapter_table import AdapterTable, BlockAdapter
from partitioner.lora_sizes import lora_sizes
from partitioner.model import ModelTable
from partitioner.side_sizes import side_network_sizes
from plutino.errors import ConfigError
from plutino.families import ATTENTION_OUTPUT, MLP_INNER, family_of
from plutino.job.blocks import chosen_blocks
from plutino.job.method import (
    AdaptersConfig,
    FullConfig,
    KeyValuesPart,
    MethodConfig,
    PrefixConfig,
    PromptConfig,
    PTuningV2Config,
)


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
    "lora": lora_sizes,
    "p_tuning_v2": _p_tuning_v2,
    "prefix": _prefix,
    "parallel_adapters": side_network_sizes,
    "prompt": _prompt,
}
