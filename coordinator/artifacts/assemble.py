"""Makes one PEFT adapter of the stages' parts, verifies it, and leaves it staged beside its destination.

Entry point :func:`assemble_adapter`; nothing is visible at the destination until ``publish.py`` renames it. Torch-free:
what needs torch runs in a process of its own.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict
from safetensors.numpy import save as save_safetensors

from coordinator.artifacts.durable import sync_dir, write_durable
from coordinator.artifacts.join import (
    DERIVED_PREFIX,
    PARAMETER_PREFIX,
    Float32Array,
    PartJoiner,
    read_tensors,
    tensor_sha256,
)
from coordinator.artifacts.publish import ADAPTER_CONFIG, ADAPTER_FILE, check_output_dir, staging_dir_of
from coordinator.artifacts.shadows import file_sha256
from coordinator.artifacts.verify_process import Check, Probe, VerifyReport, VerifyRequest, run_verify_process
from plutino.errors import ExportError, FrameError, UnknownJobError
from plutino.families import family_of
from plutino.hub_id import model_folder, parse_hub_id
from plutino.job.method import MethodConfig
from plutino.job.spec import JobSpec
from plutino.manifest import base_model_hash
from plutino.sizes import MIB, format_size

_KEY_PREFIX = "base_model.model."
"""What peft puts before a model's own names."""

_VERIFY_BASE_S = 300
_SLOWEST_LOAD_BYTES_PER_S = 20 * MIB
"""A reload may take 300 s for imports and the probe, and the base is read at least so fast."""


class AssembleRequest(BaseModel):
    """Which parts to join, and how to verify the result."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    job_id: str
    step: int
    """Optimiser steps behind these parameters."""
    shadows: dict[str, str]
    """Shadow id -> sha256 of its file; together they hold every parameter."""
    parameter_names: tuple[str, ...]
    """Global names of all the job's parameters."""
    adapter_config_json: str
    """Content of adapter_config.json, from any stage."""
    output_dir: str
    """Where the adapter will be published."""
    base_hash: str
    """Hash of the base model that was trained on."""
    verify_reload_budget_bytes: int = 0
    """Memory that reloading base and adapter may take; 0 never reloads."""
    probe: Probe | None = None
    """Rows with the pipeline's loss; None: the adapter is not run."""


class AssembledAdapter(BaseModel):
    """A verified adapter that is not visible yet."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    staging_dir: str
    adapter_sha256: str
    """Of adapter_model.safetensors."""
    shadow_id: str
    """Where the workers find adapter_model.safetensors in the bulk process; empty for a whole model."""
    model_files: dict[str, str] = {}
    """Of a whole model: sha256 of each file of weights by name."""
    checks: tuple[Check, ...]
    """What was checked, with the outcome in words and numbers."""
    was_reloaded: bool
    """Whether base and adapter were loaded with stock peft and run."""


class ShadowExchange(Protocol):
    """The part of the bulk client that is needed here."""

    def get_shadow(self, job_id: str, shadow_id: str, sha256: str) -> bytearray:
        """Fetch a shadow, verified against its sha256."""

    def put_shadow(self, job_id: str, shadow_id: str, data: bytes, sha256: str) -> None:
        """Store a shadow durably."""


def assemble_adapter(
    request: AssembleRequest,
    spec: JobSpec,
    bulk: ShadowExchange,
    *,
    verify: Callable[[VerifyRequest], VerifyReport] = run_verify_process,
) -> AssembledAdapter:
    """Join, stage, verify and hand the adapter to the workers; a repeated call begins anew.

    Raises:
        ConfigError: the output folder holds something else than an earlier result of this job.
        ExportError: a part or the whole failed a check; the staging folder is gone then.
        UnreachableError: the bulk process does not answer.
    """
    output_dir = Path(request.output_dir)
    check_output_dir(output_dir, request.job_id)
    checks = [check_base(request, spec)]
    config = _adapter_config(request, spec)
    parts, sent_sha256 = _join(request, spec.method.derived_names(config), bulk)
    tensors = spec.method.checkpoint_of(parts)
    tied = _tied_copies(spec, tensors)
    staging_dir = staging_dir_of(output_dir, request.job_id)
    try:
        # The bytes are those of peft's own save: same metadata, and the format orders the tensors by itself.
        data = save_safetensors({**tensors, **tied}, metadata={"format": "pt"})
        _stage(staging_dir, data, json.dumps(config, indent=2, sort_keys=True).encode())
        adapter_file = staging_dir / ADAPTER_FILE
        checks.append(_check_staged(adapter_file, spec.method, sent_sha256, len(request.shadows)))
        report = verify(verify_request(request, spec, staging_dir))
        adapter_sha256 = file_sha256(adapter_file)
        # The hash is in the id because a shadow is immutable, and a step that is undone and done again may differ.
        shadow_id = f"adapter-step{request.step}-{adapter_sha256[:12]}"
        bulk.put_shadow(request.job_id, shadow_id, data, adapter_sha256)
    except BaseException:
        shutil.rmtree(staging_dir, ignore_errors=True)
        raise
    return AssembledAdapter(
        staging_dir=str(staging_dir),
        adapter_sha256=adapter_sha256,
        shadow_id=shadow_id,
        checks=(*checks, *report.checks),
        was_reloaded=report.was_reloaded,
    )


def check_base(request: AssembleRequest, spec: JobSpec) -> Check:
    """Is the base model still the one that was trained on?

    Raises:
        ExportError: it is not.
    """
    found = base_model_hash(model_folder(spec.model.path))
    if found != request.base_hash:
        raise ExportError(
            f"the base model in {spec.model.path} has hash {found[:12]} now, the job was trained on "
            f"{request.base_hash[:12]}; nothing was published: put the files back as they were"
        )
    return "base model", f"its files have the hash {found[:12]} that every device trained on"


def _join(
    request: AssembleRequest, derived_names: Sequence[str], bulk: ShadowExchange
) -> tuple[dict[str, Float32Array], dict[str, str]]:
    joiner = PartJoiner(derived_names or request.parameter_names)
    prefix = DERIVED_PREFIX if derived_names else PARAMETER_PREFIX
    for shadow_id, sha256 in sorted(request.shadows.items()):
        joiner.add(f"part {shadow_id}", fetch_part(request, bulk, shadow_id, sha256, prefix))
    return joiner.joined()


def fetch_part(
    request: AssembleRequest, bulk: ShadowExchange, shadow_id: str, sha256: str, prefix: str
) -> dict[str, Float32Array]:
    """Tensors of one stage's shadow whose names start with ``prefix``, by the rest of their names.

    Raises:
        ExportError: there is no such shadow, or it is broken.
    """
    try:
        data = bulk.get_shadow(request.job_id, shadow_id, sha256)
    except (FrameError, UnknownJobError) as error:
        raise ExportError(
            f"part {shadow_id} of job {request.job_id} cannot be used: {error}; nothing was published"
        ) from error
    return read_tensors(data, f"part {shadow_id}", prefix)


def _tied_copies(spec: JobSpec, tensors: dict[str, Float32Array]) -> dict[str, Float32Array]:
    """What peft saves a second time: a head that stays tied to a trained embedding is one parameter of two keys."""
    if not spec.method.saves_tied_head:
        return {}
    config = json.loads((model_folder(spec.model.path) / "config.json").read_bytes())
    family = family_of(config.get("model_type"))
    return {_KEY_PREFIX + family.head: tensors[_KEY_PREFIX + family.embedding[0]]}


def _adapter_config(request: AssembleRequest, spec: JobSpec) -> dict[str, Any]:
    """Content of adapter_config.json."""
    try:
        config: dict[str, Any] = dict(json.loads(request.adapter_config_json))
    except (ValueError, TypeError) as error:
        raise ExportError(
            f"the adapter's config is not a JSON mapping: {error}; nothing was published, please report this"
        ) from error
    if not config.get("base_model_name_or_path"):
        hub_id = parse_hub_id(spec.model.path)
        config["base_model_name_or_path"] = spec.model.path if hub_id is None else hub_id.repository
        if hub_id is not None:
            config["revision"] = hub_id.revision
    return config


def _stage(staging_dir: Path, data: bytes, config: bytes) -> None:
    try:
        if staging_dir.exists():
            shutil.rmtree(staging_dir)
        staging_dir.mkdir(parents=True)
        write_durable(staging_dir / ADAPTER_FILE, data)
        write_durable(staging_dir / ADAPTER_CONFIG, config)
        sync_dir(staging_dir)
    except OSError as error:
        raise ExportError(
            f"the adapter of {format_size(len(data))} cannot be written to {staging_dir}: {error.strerror}; nothing "
            "was published: make room and access there, then export again"
        ) from error


def _check_staged(path: Path, method: MethodConfig, sent_sha256: dict[str, str], num_parts: int) -> Check:
    """Read the file back and compare every tensor with what its stage sent."""
    staged = method.parts_of(read_tensors(path.read_bytes(), str(path)), sent_sha256.keys())
    for name, sha256 in sent_sha256.items():
        found = tensor_sha256(staged[name])
        if found != sha256:
            raise ExportError(
                f"{name} has sha256 {found[:12]} in {path}, its stage sent {sha256[:12]}; nothing was published: the "
                "disk or memory of this machine is failing"
            )
    return (
        "joined parts",
        f"all {len(sent_sha256)} parameters of {num_parts} parts, each once and finite, read back from the disk with "
        f"the sha256 that its stage sent; {format_size(path.stat().st_size)}",
    )


def verify_request(request: AssembleRequest, spec: JobSpec, staging_dir: Path) -> VerifyRequest:
    """What the verification process is asked about a staged folder."""
    load_s = request.verify_reload_budget_bytes // _SLOWEST_LOAD_BYTES_PER_S
    return VerifyRequest(
        base_dir=str(model_folder(spec.model.path)),
        adapter_dir=str(staging_dir.resolve()),
        probe=request.probe,
        reload_budget_bytes=request.verify_reload_budget_bytes,
        time_limit_s=_VERIFY_BASE_S + load_s,
    )
