"""How many parameters LoRA would add.

peft's own matching rules are followed (peft 0.21: ``check_target_module_exists``, ``get_pattern_key``,
``modules_to_save``), because the plan's memory must be that of the modules peft will create.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from partitioner.adapter_table import AdapterTable, BlockAdapter
from partitioner.model import LinearShape, ModelTable
from plutino.errors import ConfigError
from plutino.families import family_of
from plutino.job.blocks import chosen_blocks
from plutino.job.method import LoraConfig


def lora_sizes(table: ModelTable, method: LoraConfig) -> AdapterTable:
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
