"""Folds a LoRA adapter into its base model: a plain transformers folder, written tensor by tensor.

Entry point :func:`merge_adapter`. Neither model nor checkpoint is ever whole in memory: a tensor that the adapter does
not touch is copied as bytes, one that it touches is read, given to peft (:mod:`coordinator.artifacts.fold`) and
written. It imports torch and peft, so only ``plutino merge`` imports it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from pydantic import BaseModel, ConfigDict
from safetensors import safe_open
from torch import Tensor

from coordinator.artifacts.durable import sync_dir
from coordinator.artifacts.fold import DTYPES, LayerUpdate, fold
from coordinator.artifacts.publish import ADAPTER_CONFIG, ADAPTER_FILE, RECORD_FILE
from coordinator.artifacts.shadows import file_sha256
from coordinator.artifacts.write_model import TensorPlan, write_model
from plutino.errors import ConfigError, ExportError, ModelError
from plutino.families import Family, family_of
from plutino.hub_id import model_folder
from plutino.manifest import base_model_hash, parse_model_config
from plutino.safetensors_index import TensorEntry, read_safetensors_headers
from plutino.sizes import format_size

_KEY_PREFIX = "base_model.model."
_LORA_KEYS = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
_COPIED_SUFFIXES = frozenset({".json", ".jinja", ".txt", ".model"})
"""Configuration and tokenizer files; weights are written anew, code is never copied."""
_COPY_BYTES = 1 << 22
_UNFOLDABLE_SETTINGS = (
    "lora_bias",
    "target_parameters",
    "trainable_token_indices",
    "layer_replication",
    "alora_invocation_tokens",
    "use_qalora",
)
"""Settings of peft's LoRA under which a merge would be more than a weight's update."""
_NOT_LORA = {
    "PROMPT_TUNING": "a prompt is made of virtual tokens and changes no weight",
    "PREFIX_TUNING": "a prefix is made of keys and values and changes no weight",
    "P_TUNING": "a prompt is made of virtual tokens and changes no weight",
}


class MergedModel(BaseModel):
    """What was written."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    output_dir: str
    files: tuple[str, ...]
    """The weights' files."""
    num_tensors: int
    num_folded: int
    """Layers that LoRA was folded into."""
    num_replaced: int
    """Tensors that the adapter holds whole (modules_to_save)."""
    total_bytes: int
    base_hash: str
    is_base_checked: bool
    """Whether the adapter says by its hash which base it belongs to; stock peft's adapters do not."""


@dataclass(frozen=True, slots=True)
class _Adapter:
    folder: Path
    config: peft.LoraConfig
    updates: Mapping[str, LayerUpdate]
    """By module."""
    replaced: Mapping[str, Tensor]
    """Whole tensors by parameter name."""


def merge_adapter(
    adapter_dir: Path, output_dir: Path, *, base_dir: Path | None = None, max_shard_bytes: int = 5 * 10**9
) -> MergedModel:
    """Write the base with the adapter folded in; nothing is visible at the destination before it is whole.

    Args:
        adapter_dir: holds adapter_config.json and adapter_model.safetensors.
        output_dir: does not exist yet.
        base_dir: where the base lies now; None: where the adapter says.
        max_shard_bytes: bound on one file of weights.

    Raises:
        ConfigError: the method cannot be folded, the base is another or a quantised one, or the output exists.
        ModelError: the base's files cannot be read.
        ExportError: merged weights are not finite, or the disk refuses.
    """
    if output_dir.exists():
        raise ConfigError(f"{output_dir} exists; choose a folder that does not exist yet with --out")
    values = _read_config(adapter_dir)
    folder = base_dir or model_folder(str(values.get("base_model_name_or_path") or ""))
    base_hash, is_checked = _check_base(adapter_dir, folder)
    model_config = parse_model_config((folder / "config.json").read_bytes(), str(folder / "config.json"))
    if model_config.get("quantization_config") is not None:
        raise ConfigError(
            f"{folder} is stored quantised, and folding would have to round anew, which undoes what was trained; "
            "merge into the unquantised model of the same weights with --base, or use the adapter beside the base"
        )
    adapter = _read_adapter(adapter_dir)
    entries = read_safetensors_headers(folder)
    family = family_of(model_config.get("model_type"))
    merge = _Merge(folder, entries, adapter, family, is_tied=_is_tied(model_config, family))
    staging_dir = output_dir.parent / f".{output_dir.name}.merging"
    shutil.rmtree(staging_dir, ignore_errors=True)
    try:
        staging_dir.mkdir(parents=True)
        files = write_model(staging_dir, merge.plans(), merge.read, max_shard_bytes=max_shard_bytes)
        _copy_files(folder, staging_dir, {"tie_word_embeddings": False} if merge.unties else {})
        record = {"format": 1, "merged_from": {"base_hash": base_hash, ADAPTER_FILE: _adapter_sha256(adapter_dir)}}
        (staging_dir / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        written = read_safetensors_headers(staging_dir)
        sync_dir(staging_dir)
        staging_dir.rename(output_dir)
        sync_dir(output_dir.parent)
    except OSError as error:
        raise ExportError(f"{output_dir} cannot be written: {error.strerror}; make room and access there") from error
    finally:
        shutil.rmtree(staging_dir, ignore_errors=True)
    return MergedModel(
        output_dir=str(output_dir),
        files=files,
        num_tensors=len(written),
        num_folded=len(adapter.updates),
        num_replaced=len(adapter.replaced),
        total_bytes=sum(entry.end - entry.start for entry in written.values()),
        base_hash=base_hash,
        is_base_checked=is_checked,
    )


class _Merge:
    """Which stored tensor becomes what."""

    def __init__(
        self, folder: Path, entries: Mapping[str, TensorEntry], adapter: _Adapter, family: Family, *, is_tied: bool
    ) -> None:
        self._folder = folder
        self._entries = entries
        self._adapter = adapter
        stored_of = _StoredNames(entries, family)
        self._updates = {stored_of(f"{module}.weight", is_tied): one for module, one in adapter.updates.items()}
        embedding, head = family.embedding[0], family.head
        for name in (embedding, head):
            if name.removesuffix(".weight") in adapter.updates:
                raise ConfigError(
                    f"the adapter has LoRA on {name.removesuffix('.weight')}, which is not folded; "
                    "use peft's merge_and_unload"
                )
        replaced = dict(adapter.replaced)
        self.unties = False
        if is_tied and (embedding in replaced or head in replaced):
            ends = [replaced.get(name) for name in (embedding, head)]
            if ends[0] is not None and ends[1] is not None and torch.equal(ends[0], ends[1]):
                del replaced[head]
            else:
                # One end was trained away from the other: the merged model has two of them.
                self.unties = True
        self._replaced: dict[str, tuple[TensorEntry, Tensor | None]] = {}
        for name, tensor in replaced.items():
            entry = entries[stored_of(name, is_tied)]
            if tuple(tensor.shape) != entry.shape:
                raise ConfigError(
                    f"{name} is {list(tensor.shape)} in the adapter and {list(entry.shape)} in the base; "
                    "it belongs to another base model"
                )
            self._replaced[stored_of.own(name) or name] = entry, tensor
        if self.unties:
            for name in (embedding, head):
                key = stored_of.own(name) or name
                if key not in self._replaced:
                    self._replaced[key] = entries[stored_of(name, is_tied)], None

    def plans(self) -> list[TensorPlan]:
        """What will be written, in the base's order, what it lacks at the end."""
        shown = {**self._entries, **{name: entry for name, (entry, _) in self._replaced.items()}}
        return [
            TensorPlan(name, entry.dtype, entry.shape, entry.end - entry.start)
            for name, entry in sorted(shown.items(), key=lambda item: (item[0] not in self._entries, _place(item[1])))
        ]

    def read(self, name: str) -> Iterator[bytes | memoryview]:
        """Bytes of a tensor as it is written."""
        if name in self._replaced:
            entry, tensor = self._replaced[name]
            if tensor is None:
                yield from self._stored(entry)
            else:
                yield _bytes(_finite(name, tensor.to(_dtype(name, entry))))
        elif name in self._updates:
            entry, update = self._entries[name], self._updates[name]
            data = bytearray().join(self._stored(entry))
            weight = torch.frombuffer(data, dtype=_dtype(name, entry)).view(entry.shape)
            try:
                merged = fold(weight, update, self._adapter.config)
            except (ValueError, RuntimeError) as error:
                raise ConfigError(f"{name}: {error}; the adapter belongs to another base model") from error
            yield _bytes(_finite(name, merged))
        else:
            yield from self._stored(self._entries[name])

    def _stored(self, entry: TensorEntry) -> Iterator[bytes]:
        with (self._folder / entry.file).open("rb") as file:
            file.seek(entry.start)
            left_bytes = entry.end - entry.start
            while left_bytes:
                piece = file.read(min(_COPY_BYTES, left_bytes))
                if not piece:
                    raise ModelError(f"{self._folder / entry.file} became shorter while it was read; merge again")
                left_bytes -= len(piece)
                yield piece


class _StoredNames:
    """Names in a base's files by the names in its class: prefixes are missing there, and heads tied or renamed."""

    def __init__(self, entries: Mapping[str, TensorEntry], family: Family) -> None:
        self._entries = entries
        self._family = family
        self._renamed = {own: stored for stored, own in (family.renamed or {}).items()}

    def own(self, name: str) -> str | None:
        """Where the parameter itself is stored; None: nowhere."""
        prefix = self._family.optional_prefix
        candidates = (name, name.removeprefix(prefix), self._renamed.get(name, name))
        return next((candidate for candidate in candidates if candidate in self._entries), None)

    def __call__(self, name: str, is_tied: bool) -> str:
        """Where the parameter is stored, itself or as the other one of tied ends.

        Raises:
            ConfigError: the base does not have it.
        """
        found = self.own(name)
        ends = (self._family.embedding[0], self._family.head)
        if found is None and is_tied and name in ends:
            found = self.own(ends[1 - ends.index(name)])
        if found is None:
            raise ConfigError(f"the adapter changes {name}, which the base model does not store; is it another base?")
        return found


def _read_config(adapter_dir: Path) -> dict[str, Any]:
    path = adapter_dir / ADAPTER_CONFIG
    try:
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; name the folder of a published adapter") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}; copy the adapter anew") from error
    kind = values.get("peft_type")
    if kind != "LORA":
        why = _NOT_LORA.get(str(kind), f"peft type {kind!r} adds layers between the model's own")
        raise ConfigError(f"{adapter_dir} cannot be folded into weights: {why}; load it beside the base instead")
    odd = [setting for setting in _UNFOLDABLE_SETTINGS if values.get(setting)]
    if values.get("bias", "none") != "none":
        odd.append("bias")
    if odd:
        raise ConfigError(f"{path} sets {', '.join(odd)}, which is not folded; use peft's merge_and_unload")
    return dict(values)


def _check_base(adapter_dir: Path, folder: Path) -> tuple[str, bool]:
    """The base's hash, and whether the adapter names it."""
    if not folder.is_dir():
        raise ConfigError(f"the adapter's base model is not in {folder}; say where it is with --base")
    found = base_model_hash(folder)
    record = adapter_dir / RECORD_FILE
    if not record.is_file():
        return found, False
    expected = json.loads(record.read_bytes()).get("base_hash")
    if expected != found:
        raise ConfigError(
            f"the adapter was trained on a base with hash {str(expected)[:12]}, {folder} has {found[:12]}; "
            "say with --base where its own base is"
        )
    return found, True


def _read_adapter(adapter_dir: Path) -> _Adapter:
    config = peft.LoraConfig.from_pretrained(str(adapter_dir))
    assert isinstance(config, peft.LoraConfig)
    parts: dict[str, dict[str, Tensor]] = {}
    replaced: dict[str, Tensor] = {}
    with safe_open(adapter_dir / ADAPTER_FILE, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118  not a mapping
            name = key.removeprefix(_KEY_PREFIX)
            ending = next((ending for ending in _LORA_KEYS if name.endswith(f".{ending}")), None)
            if ending is not None:
                parts.setdefault(name.removesuffix(f".{ending}"), {})[ending] = file.get_tensor(key)
            elif "lora_" in name:
                raise ConfigError(f"{adapter_dir} holds {name}, which is not folded; use peft's merge_and_unload")
            else:
                replaced[name] = file.get_tensor(key)
    updates = {module: LayerUpdate(module, tensors) for module, tensors in sorted(parts.items())}
    return _Adapter(adapter_dir, config, updates, replaced)


def _copy_files(folder: Path, output_dir: Path, config_changes: Mapping[str, Any]) -> None:
    for path in sorted(folder.iterdir()):
        if path.suffix in _COPIED_SUFFIXES and not path.name.endswith(".index.json") and path.name != RECORD_FILE:
            shutil.copyfile(path, output_dir / path.name)
    if config_changes:
        values = parse_model_config((folder / "config.json").read_bytes(), str(folder / "config.json"))
        text = json.dumps({**values, **config_changes}, indent=2, sort_keys=True) + "\n"
        (output_dir / "config.json").write_text(text, encoding="utf-8")


def _adapter_sha256(adapter_dir: Path) -> str:
    return file_sha256(adapter_dir / ADAPTER_FILE)


def _is_tied(config: Mapping[str, Any], family: Family) -> bool:
    return family.is_tied(config)


def _place(entry: TensorEntry) -> tuple[str, int]:
    return entry.file, entry.start


def _dtype(name: str, entry: TensorEntry) -> torch.dtype:
    if entry.dtype not in DTYPES:
        raise ConfigError(f"{name} is stored as {entry.dtype}; weights can be folded into {', '.join(DTYPES)} only")
    return DTYPES[entry.dtype]


def _finite(name: str, tensor: Tensor) -> Tensor:
    if not bool(tensor.isfinite().all()):
        raise ExportError(f"{name} is not finite after the merge; the adapter is broken: train it with a lower lr")
    return tensor


def _bytes(tensor: Tensor) -> memoryview:
    flat: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def describe(merged: MergedModel) -> str:
    """What was written, for a person."""
    checked = (
        "its hash is the adapter's" if merged.is_base_checked else "not checked: the adapter does not name its hash"
    )
    return (
        f"{merged.num_folded} layers folded, {merged.num_replaced} tensors replaced, "
        f"{merged.num_tensors} tensors written to {merged.output_dir} "
        f"({format_size(merged.total_bytes)} in {len(merged.files)} {'file' if len(merged.files) == 1 else 'files'}); "
        f"base {merged.base_hash[:12]} ({checked})"
    )
