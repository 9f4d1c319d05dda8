"""Which method an adapter was trained with, from its adapter_config.json: what loads stock peft's adapters, too.

Entry point: :func:`method_of_adapter`. The method has what loading and computing need; what only training asked for
(dropout, initial values, the MLP of a projected prefix) is not in it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from plutino.errors import ConfigError
from plutino.job.adapted_base import AdaptedBase
from plutino.job.method import (
    AdaptersConfig,
    LoraConfig,
    MethodConfig,
    ParallelAdaptersConfig,
    PromptConfig,
    PTuningV2Config,
)

ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_TENSORS_FILE = "adapter_model.safetensors"
SEQ2SEQ = "SEQ_2_SEQ_LM"
"""peft's task type of encoder-decoders."""

_LORA_WITHOUT = (
    "exclude_modules",
    "layers_pattern",
    "megatron_config",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "use_qalora",
    "layer_replication",
    "lora_bias",
    "target_parameters",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
)
"""Settings of peft's LoRA that change what it computes in ways that plutino does not know."""


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json of an adapter's folder.

    Raises:
        ConfigError: there is no adapter in the folder.
    """
    path = folder / ADAPTER_CONFIG_FILE
    try:
        values = json.loads(path.read_bytes())
    except OSError as error:
        whole = " (a whole model lies there: name it as the base model)" if (folder / "config.json").is_file() else ""
        raise ConfigError(f"{folder} holds no adapter: cannot read {path.name}: {error.strerror}{whole}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}; copy the adapter anew") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is no JSON object; copy the adapter anew")
    if not (folder / ADAPTER_TENSORS_FILE).is_file():
        raise ConfigError(f"{folder} holds {path.name} but no {ADAPTER_TENSORS_FILE}; copy the adapter anew")
    return values


def method_of_adapter(values: Mapping[str, Any], where: str, base: AdaptedBase | None = None) -> MethodConfig:
    """The method that computes what an adapter of this adapter_config.json computes.

    Args:
        values: content of the file.
        where: its folder, for messages.
        base: its base model; None: not known.

    Raises:
        ConfigError: plutino has no such method, or not with these settings, or they say too little without the base
            model.
    """
    kind = str(values.get("peft_type"))
    make = _METHODS.get(kind)
    if make is None:
        raise ConfigError(f"{where}: plutino knows no adapters of type {kind}, but {', '.join(sorted(_METHODS))}")
    task = values.get("task_type")
    if task not in (None, "CAUSAL_LM", SEQ2SEQ):
        raise ConfigError(f"{where}: the adapter is for {task}, which answers with scores and not with text")
    if base is not None and task is not None and (task == SEQ2SEQ) != base.writes_what_it_read:
        raise ConfigError(f"{where}: the adapter is for {task}, which {base.family.model_type} does not do")
    try:
        return make(values, base)
    except (KeyError, TypeError, ValidationError, ConfigError) as error:
        raise ConfigError(f"{where}: {ADAPTER_CONFIG_FILE} cannot be used: {error}") from error


def _lora(values: Mapping[str, Any], base: AdaptedBase | None) -> LoraConfig:
    odd = [name for name in _LORA_WITHOUT if values.get(name)]
    if values.get("bias", "none") != "none":
        odd.append("bias")
    targets = values["target_modules"]
    if isinstance(targets, str) and targets != "all-linear":
        odd.append("target_modules (a regular expression)")
    if odd:
        raise ConfigError(f"it sets {', '.join(odd)}, which plutino's LoRA does not have; load it with peft")
    return LoraConfig(
        rank=values["r"],
        alpha=values["lora_alpha"],
        target_modules="all-linear" if targets == "all-linear" else tuple(targets),
        blocks=_transformed_blocks(values, base),
        rank_pattern=values.get("rank_pattern") or {},
        alpha_pattern=values.get("alpha_pattern") or {},
        use_rslora=bool(values.get("use_rslora")),
        use_dora=bool(values.get("use_dora")),
        modules_to_save=tuple(values.get("modules_to_save") or ()),
        ensure_weight_tying=bool(values.get("ensure_weight_tying")),
    )


def _transformed_blocks(values: Mapping[str, Any], base: AdaptedBase | None) -> tuple[int, ...] | None:
    layers = values.get("layers_to_transform")
    if layers is None:
        return None
    blocks = (layers,) if isinstance(layers, int) else tuple(layers)
    if not _has_halves(values, base):
        return blocks
    known = _known(base)
    # peft means the blocks of that number in either half.
    num_of_encoder, num_blocks = known.num_encoder_blocks, known.family.num_blocks(known.values)
    of_encoder = {block for block in blocks if block < num_of_encoder}
    return tuple(sorted(of_encoder | {num_of_encoder + b for b in blocks if num_of_encoder + b < num_blocks}))


def _has_halves(values: Mapping[str, Any], base: AdaptedBase | None) -> bool:
    return values.get("task_type") == SEQ2SEQ if base is None else base.writes_what_it_read


def _known(base: AdaptedBase | None) -> AdaptedBase:
    if base is None:
        raise ConfigError(
            "which blocks of an encoder-decoder it means says the base model's config.json alone; say it with --model"
        )
    return base


def _prefix(values: Mapping[str, Any], base: AdaptedBase | None) -> PTuningV2Config:
    # peft stores keys and values, whatever they came from.
    return PTuningV2Config(num_virtual_tokens=values["num_virtual_tokens"], init="zero")


def _prompt(values: Mapping[str, Any], base: AdaptedBase | None) -> PromptConfig:
    return PromptConfig(num_virtual_tokens=values["num_virtual_tokens"], init="random")


def _adapters(values: Mapping[str, Any], base: AdaptedBase | None) -> AdaptersConfig:
    has_halves = _has_halves(values, base)
    decoder_prefix = halves.decoder_prefix if has_halves and (halves := _known(base).family.halves) else None
    blocks = set()
    for layer in values["layers"]:
        found = re.search(r"\.(\d+)\.", layer)
        if found is not None:
            is_of_decoder = decoder_prefix is not None and layer.startswith(decoder_prefix)
            blocks.add(int(found[1]) + (_known(base).num_encoder_blocks if is_of_decoder else 0))
    return AdaptersConfig(
        placement=values["placement"],
        bottleneck=values["bottleneck"],
        activation=values["activation"],
        blocks=tuple(sorted(blocks)),
    )


def _parallel_adapters(values: Mapping[str, Any], base: AdaptedBase | None) -> ParallelAdaptersConfig:
    # Narrow heads are as many as the model's.
    own_heads = None if base is None else AdaptedBase(base.family, values.get("config") or {}).num_heads
    is_whole = base is not None and own_heads is not None and own_heads != base.num_heads
    return ParallelAdaptersConfig(
        reduction=values["reduction"],
        heads="whole" if is_whole else "narrow",
        blocks=tuple(values["blocks"]),
        init="random",
    )


_METHODS: Mapping[str, Callable[[Mapping[str, Any], AdaptedBase | None], MethodConfig]] = {
    "LORA": _lora,
    "PREFIX_TUNING": _prefix,
    "PROMPT_TUNING": _prompt,
    "PLUTINO_BOTTLENECK": _adapters,
    "PLUTINO_SIDE_NETWORK": _parallel_adapters,
}
