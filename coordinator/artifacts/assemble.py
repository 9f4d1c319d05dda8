"""Makes one PEFT adapter of the stages' parts, verifies it, and leaves it staged beside its destination.

Entry point :func:`assemble_adapter`; nothing is visible at the destination until ``publish.py`` renames it. Torch-free:
what needs torch runs in a process of its own.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

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
from coordinator.artifacts.parts import (
    AssembledAdapter,
    AssembleRequest,
    ShadowExchange,
    check_base,
    check_read_back,
    fetch_part,
    verify_request,
)
from coordinator.artifacts.publish import ADAPTER_CONFIG, ADAPTER_FILE, check_output_dir, staging_dir_of
from coordinator.artifacts.shadows import file_sha256
from coordinator.artifacts.verify_process import Check, VerifyReport, VerifyRequest, run_verify_process
from plutino.errors import ExportError
from plutino.families import family_of
from plutino.hub_id import model_folder, parse_hub_id
from plutino.job.method import MethodConfig
from plutino.job.spec import JobSpec
from plutino.sizes import format_size

_KEY_PREFIX = "base_model.model."
"""What peft puts before a model's own names."""


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


def _join(
    request: AssembleRequest, derived_names: Sequence[str], bulk: ShadowExchange
) -> tuple[dict[str, Float32Array], dict[str, str]]:
    joiner = PartJoiner(derived_names or request.parameter_names)
    prefix = DERIVED_PREFIX if derived_names else PARAMETER_PREFIX
    for shadow_id, sha256 in sorted(request.shadows.items()):
        joiner.add(f"part {shadow_id}", fetch_part(request, bulk, shadow_id, sha256, prefix))
    return joiner.joined()


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
    return check_read_back(
        sent_sha256,
        lambda name: tensor_sha256(staged[name]),
        where=path,
        what=f"parameters of {num_parts} parts",
        num_bytes=path.stat().st_size,
    )
