"""How many parameters a method would add to each block, without building it.

Follows peft's own matching rules (peft 0.21: ``check_target_module_exists``, ``get_pattern_key``,
``modules_to_save``), because the plan's memory must be that of the modules peft will create.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from partitioner.model import LinearShape, ModelTable
from partitioner.values import PlanValue
from plutino.errors import ConfigError
from plutino.families import family_of
from plutino.job.method import LoraConfig


class BlockAdapter(PlanValue):
    """What a method adds to one block."""

    params: int
    """Trainable parameters."""
    rank_sum: int
    """Sum of the ranks of its adapted linears."""
    linears: tuple[str, ...]
    """Dotted names, inside the block, of its adapted linears."""


class AdapterTable(PlanValue):
    """What a method adds to a model; the fields of a JobShape come from here."""

    blocks: tuple[BlockAdapter, ...]
    first_params: int
    """Trainable parameters of the embedding."""
    last_params: int
    """Trainable parameters of the head."""
    use_dora: bool

    @property
    def num_params(self) -> int:
        """All trainable parameters."""
        return sum(block.params for block in self.blocks) + self.first_params + self.last_params

    @property
    def shape_fields(self) -> dict[str, Any]:
        """The fields of :class:`partitioner.model.JobShape` that a method decides, by name."""
        return {
            "adapter_params": tuple(block.params for block in self.blocks),
            "adapter_rank_out": tuple(block.rank_sum for block in self.blocks),
            "adapted_linears": tuple(block.linears for block in self.blocks),
            "first_trainable_params": self.first_params,
            "last_trainable_params": self.last_params,
            "use_dora": self.use_dora,
        }


def adapter_params_of(table: ModelTable, method: LoraConfig) -> AdapterTable:
    """Sizes of the adapter that peft would create on the whole model.

    A linear of shape in x out gets rank * (in + out) parameters (Hu et al. 2021, arXiv:2106.09685), with DoRA one
    magnitude more for each of its outputs (Liu et al. 2024, arXiv:2402.09353).

    Raises:
        ConfigError: a name in target_modules, layers_to_transform or modules_to_save matches nothing, or nothing at
            all would be trained.
    """
    _check_layers(table, method)
    blocks = tuple(_block_adapter(table, method, index) for index in range(table.num_blocks))
    _check_targets(table, method)
    first_params, last_params = _outer_params(table, method)
    adapter = AdapterTable(blocks=blocks, first_params=first_params, last_params=last_params, use_dora=method.use_dora)
    if adapter.num_params == 0:
        raise ConfigError("the method would train 0 parameters; set method.target_modules or layers_to_transform")
    return adapter


def _block_adapter(table: ModelTable, method: LoraConfig, index: int) -> BlockAdapter:
    if method.layers_to_transform is not None and index not in method.layers_to_transform:
        return BlockAdapter(params=0, rank_sum=0, linears=())
    prefix = f"{family_of(table.family).block_prefix}{index}."
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


def _check_layers(table: ModelTable, method: LoraConfig) -> None:
    outside = [index for index in method.layers_to_transform or () if not 0 <= index < table.num_blocks]
    if outside:
        raise ConfigError(
            f"method.layers_to_transform names block {outside[0]}, but the model has blocks 0 to {table.num_blocks - 1}"
        )


def _check_targets(table: ModelTable, method: LoraConfig) -> None:
    if method.target_modules == "all-linear":
        return
    prefix = family_of(table.family).block_prefix
    keys = [
        f"{prefix}{index}.{linear.name}" for index in range(table.num_blocks) for linear in table.block_linears[index]
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
            known = " and ".join(key.rpartition(".")[2] for key in (embedding_key, head_key))
            raise ConfigError(f"method.modules_to_save: {name!r} cannot be trained in full; this model has {known}")
    if method.ensure_weight_tying and table.is_tied and any(wanted.values()):
        wanted = dict.fromkeys(wanted, True)
    # The token embedding alone, which has the head's shape: learned positions stay frozen.
    token_params = table.head_params
    return (token_params if wanted[embedding_key] else 0), (table.head_params if wanted[head_key] else 0)
