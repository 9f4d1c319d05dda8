"""Makes a whole model of the stages' parts, in shards, with at most one stage's state in memory.

The counterpart of ``assemble.py`` for methods that train the weights themselves. Entry point :func:`assemble_model`;
what it stages is a folder that transformers loads. Torch-free.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from coordinator.artifacts.durable import sync_dir, write_durable
from coordinator.artifacts.join import PARAMETER_PREFIX, Float32Array, tensor_sha256
from coordinator.artifacts.parts import (
    AssembledAdapter,
    AssembleRequest,
    ShadowExchange,
    check_base,
    check_read_back,
    fetch_part,
    verify_request,
)
from coordinator.artifacts.publish import RECORD_FILE, check_output_dir, staging_dir_of
from coordinator.artifacts.shadows import file_sha256
from coordinator.artifacts.verify_process import Check, VerifyReport, VerifyRequest, run_verify_process
from coordinator.artifacts.write_model import ModelWriter, TensorPlan
from plutino.errors import ExportError
from plutino.families import family_of
from plutino.hub_id import model_folder
from plutino.job.objective import ObjectiveConfig
from plutino.job.spec import JobSpec
from plutino.safetensors_index import TensorEntry, read_safetensors_headers
from plutino.sizes import GIB

_COPIED_SUFFIXES = frozenset({".json", ".jinja", ".txt", ".model"})
"""Configuration and tokenizer files of the base; code is never copied."""
_READ_BYTES = 1 << 22
_SHOWN_NAMES = 3
_MODEL_CLASS = re.compile(r"(LMHeadModel|For[A-Z]\w*|Model)$")
"""What of the name of a class of transformers says what the model is for."""


def assemble_model(
    request: AssembleRequest,
    spec: JobSpec,
    bulk: ShadowExchange,
    *,
    verify: Callable[[VerifyRequest], VerifyReport] = run_verify_process,
    max_shard_bytes: int = 4 * GIB,
) -> AssembledAdapter:
    """Stage and verify the model; a repeated call begins anew.

    Raises:
        ConfigError: the output folder holds something else than an earlier result of this job.
        ExportError: a part or the whole failed a check; the staging folder is gone then.
        UnreachableError: the bulk process does not answer.
    """
    output_dir = Path(request.output_dir)
    check_output_dir(output_dir, request.job_id)
    checks = [check_base(request, spec)]
    staging_dir = staging_dir_of(output_dir, request.job_id)
    try:
        if staging_dir.exists():
            shutil.rmtree(staging_dir)
        staging_dir.mkdir(parents=True)
        base_dir = model_folder(spec.model.path)
        files, sent_sha256 = _write_parts(request, bulk, base_dir, staging_dir, max_shard_bytes)
        # The spec may leave the classes to the data; who ran the probe knows them.
        objective = spec.objective if request.probe is None else request.probe.objective
        _copy_settings(base_dir, staging_dir, objective)
        sync_dir(staging_dir)
        checks.append(_check_staged(staging_dir, sent_sha256, len(request.shadows)))
        report = verify(verify_request(request, spec, staging_dir))
        model_files = {name: file_sha256(staging_dir / name) for name in files}
    except OSError as error:
        shutil.rmtree(staging_dir, ignore_errors=True)
        raise ExportError(
            f"the model cannot be written to {staging_dir}: {error}; nothing was published: make room and access "
            "there, then export again"
        ) from error
    except BaseException:
        shutil.rmtree(staging_dir, ignore_errors=True)
        raise
    return AssembledAdapter(
        staging_dir=str(staging_dir),
        adapter_sha256=hashlib.sha256(json.dumps(model_files, sort_keys=True).encode()).hexdigest(),
        shadow_id="",
        model_files=model_files,
        checks=(*checks, *report.checks),
        was_reloaded=report.was_reloaded,
    )


def _write_parts(
    request: AssembleRequest, bulk: ShadowExchange, base_dir: Path, staging_dir: Path, max_shard_bytes: int
) -> tuple[tuple[str, ...], dict[str, str]]:
    """Write one stage's weights after the other; gives the files, and the sha256 of each tensor as it was sent."""
    writer = ModelWriter(staging_dir, max_shard_bytes=max_shard_bytes)
    sent_sha256: dict[str, str] = {}
    for shadow_id, sha256 in sorted(request.shadows.items()):
        tensors = fetch_part(request, bulk, shadow_id, sha256, PARAMETER_PREFIX)
        own = _new_tensors(shadow_id, tensors, sent_sha256)

        def read(name: str, own: dict[str, Float32Array] = own) -> Iterator[memoryview]:
            yield np.ascontiguousarray(own[name]).reshape(-1).data.cast("B")

        if own:
            plans = [TensorPlan(name, "F32", tuple(tensor.shape), tensor.nbytes) for name, tensor in own.items()]
            writer.add(plans, read)
    missing = sorted(set(request.parameter_names) - sent_sha256.keys())
    unknown = sorted(sent_sha256.keys() - set(request.parameter_names))
    if missing or unknown:
        raise ExportError(
            f"the stages' parts lack {len(missing)} of {len(request.parameter_names)} parameters and hold "
            f"{len(unknown)} others, first {', '.join((missing + unknown)[:_SHOWN_NAMES])}; nothing was published: a "
            "stage's shadow of this step is missing"
        )
    _copy_buffers(base_dir, writer)
    return writer.finish(), sent_sha256


def _copy_buffers(base_dir: Path, writer: ModelWriter) -> None:
    """Write what the base's checkpoint holds beside its parameters, which nobody trains: BART's bias of the logits."""
    family = family_of(json.loads((base_dir / "config.json").read_bytes()).get("model_type"))
    entries = read_safetensors_headers(base_dir)
    kept = {name: entries[name] for name in family.stored_buffers if name in entries}

    def read(name: str) -> Iterator[memoryview]:
        with (base_dir / kept[name].file).open("rb") as file:
            file.seek(kept[name].start)
            yield memoryview(file.read(kept[name].end - kept[name].start))

    if kept:
        plans = [TensorPlan(name, one.dtype, one.shape, one.end - one.start) for name, one in kept.items()]
        writer.add(plans, read)


def _new_tensors(
    shadow_id: str, tensors: dict[str, Float32Array], sent_sha256: dict[str, str]
) -> dict[str, Float32Array]:
    """A part's tensors that no part before it held; the others must be the same. Adds to ``sent_sha256``."""
    own: dict[str, Float32Array] = {}
    for name, tensor in tensors.items():
        sha256 = tensor_sha256(tensor)
        if name in sent_sha256:
            if sent_sha256[name] != sha256:
                raise ExportError(
                    f"{name} of part {shadow_id} is not what another stage sent; nothing was published: its holders "
                    "have drifted apart, go back to an earlier step"
                )
            continue
        if not bool(np.isfinite(tensor).all()):
            raise ExportError(
                f"{name} of part {shadow_id} has values that are not finite; nothing was published: go on from an "
                "earlier checkpoint with a lower training.lr or max_grad_norm"
            )
        sent_sha256[name] = sha256
        own[name] = tensor
    return own


def _copy_settings(base_dir: Path, staging_dir: Path, objective: ObjectiveConfig | None) -> None:
    """The base's configuration, told that the weights are fp32 now and what they score, and its tokenizer."""
    for path in sorted(base_dir.iterdir()):
        if path.suffix in _COPIED_SUFFIXES and not path.name.endswith(".index.json") and path.name != RECORD_FILE:
            shutil.copyfile(path, staging_dir / path.name)
    values = json.loads((base_dir / "config.json").read_bytes())
    values.pop("torch_dtype", None)
    if objective is not None and objective.has_score_head:
        values |= _score_settings(values, objective)
    text = json.dumps({**values, "dtype": "float32"}, indent=2, sort_keys=True) + "\n"
    write_durable(staging_dir / "config.json", text.encode())


def _score_settings(values: Mapping[str, Any], objective: ObjectiveConfig) -> dict[str, Any]:
    """What config.json says of a score head: as many outputs as labels, and the class that has it."""
    names = getattr(objective, "labels", ())
    if objective.type != "classification":
        names = [f"LABEL_{index}" for index in range(objective.num_outputs)]
    settings: dict[str, Any] = {
        "id2label": {str(index): name for index, name in enumerate(names)},
        "label2id": {name: index for index, name in enumerate(names)},
    }
    problem = {"classification": "single_label_classification", "regression": "regression"}.get(objective.type)
    if problem is not None:
        settings["problem_type"] = problem
    if values.get("architectures"):
        settings["architectures"] = [
            _MODEL_CLASS.sub("ForSequenceClassification", name) for name in values["architectures"]
        ]
    return settings


def _check_staged(staging_dir: Path, sent_sha256: dict[str, str], num_parts: int) -> Check:
    """Read the files back and compare every tensor with what its stage sent."""
    entries = read_safetensors_headers(staging_dir)
    return check_read_back(
        sent_sha256,
        lambda name: _stored_sha256(staging_dir, entries[name]),
        where=staging_dir,
        what=f"tensors of {num_parts} parts",
        num_bytes=sum(entry.end - entry.start for entry in entries.values()),
    )


def _stored_sha256(folder: Path, entry: TensorEntry) -> str:
    digest = hashlib.sha256()
    with (folder / entry.file).open("rb") as file:
        file.seek(entry.start)
        left = entry.end - entry.start
        while left and (piece := file.read(min(left, _READ_BYTES))):
            digest.update(piece)
            left -= len(piece)
    return digest.hexdigest()
