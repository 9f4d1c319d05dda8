"""What a LoRA config means for a model, decided from the whole model's names: every stage reaches the same answer.

Matching is peft's own, so that joined stages adapt exactly what stock peft adapts. Every name that a person gave is
checked here: peft passes over those that match nothing, at most with a warning.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import peft
from peft.tuners.tuners_utils import check_target_module_exists

from edge_node.methods.base import Role
from edge_node.stage.stage import Stage
from plutino.errors import ConfigError
from plutino.family import Family
from plutino.job.blocks import chosen_blocks
from plutino.job.method import LoraConfig


def resolve_peft_config(stage: Stage, config: LoraConfig) -> peft.LoraConfig:
    """The whole model's config for peft: linear layers by name, modules_to_save left out.

    Raises:
        ConfigError: target modules or blocks that the model does not have.
    """
    blocks = None
    if config.blocks is not None and stage.family.halves is None:
        blocks = list(chosen_blocks(config.blocks, stage.num_blocks))
    # peft types alpha as int and writes it so, but computes with any number.
    values: dict[str, Any] = {
        "lora_alpha": _whole_if_possible(config.alpha),
        "alpha_pattern": {pattern: _whole_if_possible(alpha) for pattern, alpha in config.alpha_pattern.items()},
    }
    return peft.LoraConfig(
        task_type="CAUSAL_LM" if stage.family.halves is None else "SEQ_2_SEQ_LM",
        r=config.rank,
        lora_dropout=config.dropout,
        target_modules=_resolve_target_modules(stage, config),
        layers_to_transform=blocks,
        rank_pattern=dict(config.rank_pattern),
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        fan_in_fan_out=stage.family.has_conv1d,
        **values,
    )


def list_targets(stage: Stage, config: LoraConfig, peft_config: peft.LoraConfig) -> list[str]:
    """Global names of the layers that are adapted, over all stages; never empty.

    Raises:
        ConfigError: nothing is adapted, or a key of rank_pattern or alpha_pattern matches no adapted layer.
    """
    targets = [name for name in stage.block_linears if check_target_module_exists(peft_config, name)]
    if not targets:
        raise ConfigError(
            f"no linear layer of the blocks {config.blocks} is named as target_modules asks; "
            "widen method.blocks or target_modules"
        )
    for setting, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for pattern in patterns:
            if not any_name_matches(pattern, targets, setting=setting):
                raise ConfigError(
                    f"{setting}: {pattern!r} matches the end of no adapted layer's name; "
                    f"such names are {targets[0]} and {targets[-1]}"
                )
    return targets


def any_name_matches(pattern: str, names: Iterable[str], *, setting: str) -> bool:
    """Whether a key of rank_pattern or alpha_pattern means one of these layers, by peft's rule.

    Raises:
        ConfigError: the key is no regular expression.
    """
    try:
        return any(re.match(rf"(.*\.)?({pattern})$", name) for name in names)
    except re.error as error:
        raise ConfigError(f"{setting}: {pattern!r} is no regular expression: {error}") from error


def list_trained_roles(stage: Stage, config: LoraConfig) -> tuple[Role, ...]:
    """Roles that modules_to_save means, over the whole model, the embedding first.

    Raises:
        ConfigError: a module that cannot be trained in full, or nothing to tie.
    """
    embedding = stage.embedding_name.rpartition(".")[2]
    role_of: dict[str, Role] = {
        embedding: "embedding",
        stage.embedding_name: "embedding",
        **({stage.head_name: "head"} if stage.head_name else {}),
    }
    for module in config.modules_to_save:
        if module not in role_of:
            raise ConfigError(
                f"modules_to_save: {module!r} cannot be trained in full; "
                f"this model offers {' and '.join(name for name in (embedding, stage.head_name) if name)}"
            )
    named = {role_of[module] for module in config.modules_to_save}
    if config.ensure_weight_tying:
        if not stage.is_tied:
            raise ConfigError("ensure_weight_tying: embedding and head of this model are not tied; leave it out")
        if not named:
            raise ConfigError(
                f"ensure_weight_tying has nothing to tie: name {embedding} or {stage.head_name} in modules_to_save, "
                "or leave it out"
            )
        named = {"embedding", "head"}
    roles: tuple[Role, ...] = ("embedding", "head")
    return tuple(role for role in roles if role in named)


def saved_peft_config(stage: Stage, config: LoraConfig, peft_config: peft.LoraConfig) -> dict[str, Any]:
    """Content of adapter_config.json as peft writes it for the whole model, but for the order of sets.

    Linear layers go by the last part of their names also where peft lists every layer's full name (models with fewer
    than 20 of them).
    """
    values: dict[str, Any] = peft_config.to_dict()
    values["peft_type"] = "LORA"
    values["inference_mode"] = True
    values["target_modules"] = _resolve_target_modules(stage, config)
    if config.modules_to_save:
        values["modules_to_save"] = sorted(set(config.modules_to_save))
    if config.ensure_weight_tying:
        # The head's name alone ties when loaded: peft then adds the embedding by itself. Of embeddings it would
        # recognise only those that are named embed_tokens.
        values["ensure_weight_tying"] = True
        values["modules_to_save"] = [stage.head_name]
    return values


def _resolve_target_modules(stage: Stage, config: LoraConfig) -> list[str]:
    """Names by which peft finds what is adapted: the last parts, or all of them where blocks of a half are chosen.

    peft would take layers_to_transform for blocks of both halves at once.
    """
    named, family = _last_parts(stage, config), stage.family
    if config.blocks is None or family.halves is None:
        return named
    chosen = chosen_blocks(config.blocks, stage.num_blocks)
    blocks = tuple(f"{family.block_name(block, stage.num_encoder_blocks)}." for block in chosen)
    return [
        name
        for name in stage.block_linears
        if name.startswith(blocks) and any(name.endswith(f".{last}") for last in named)
    ]


def _last_parts(stage: Stage, config: LoraConfig) -> list[str]:
    # Without the full names, because peft passes over layers_to_transform for layers that are named in full.
    in_block = {str(stage.family.in_block(name)) for name in stage.block_linears}
    known = sorted({stage.family.target_name(name) for name in in_block})
    if config.target_modules == "all-linear":
        return known
    unknown = [
        target
        for target in config.target_modules
        if not any(f".{name}".endswith(f".{target}") for name in stage.block_linears)
    ]
    if unknown or not config.target_modules:
        raise ConfigError(
            f"target_modules: {', '.join(unknown) if unknown else 'an empty list'} names no linear layer of a block"
            f"{stage.family.why_untargetable(unknown)}; "
            f"this model has {', '.join(known)}, and all-linear means all of them"
        )
    return sorted({name for target in config.target_modules for name in _unambiguous(stage.family, target, in_block)})


def _unambiguous(family: Family, target: str, in_block: Iterable[str]) -> set[str]:
    """Names by which peft finds what a target means in blocks, and nothing outside of them."""
    if target not in family.named_elsewhere:
        return {target}
    return {family.target_name(name) for name in in_block if name.rpartition(".")[2] == target}


def _whole_if_possible(alpha: float) -> float | int:
    return int(alpha) if alpha == int(alpha) else alpha
