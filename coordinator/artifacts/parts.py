"""What making an adapter and making a whole model of the stages' parts have in common: request, answer and checks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from pydantic import BaseModel, ConfigDict

from coordinator.artifacts.join import Float32Array, read_tensors
from coordinator.artifacts.verify_process import Check, Probe, VerifyRequest
from plutino.errors import ExportError, FrameError, UnknownJobError
from plutino.hub_id import model_folder
from plutino.job.spec import JobSpec
from plutino.manifest import base_model_hash
from plutino.sizes import MIB, format_size

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


def check_read_back(
    sent_sha256: Mapping[str, str], found_sha256: Callable[[str], str], *, where: Path, what: str, num_bytes: int
) -> Check:
    """Compare every tensor as it lies on the disk with what its stage sent.

    Args:
        sent_sha256: of each tensor by name.
        found_sha256: reads a tensor back.
        where: file or folder that it is read from.
        what: the tensors, for people.
        num_bytes: of all of them.

    Raises:
        ExportError: one of them differs.
    """
    for name, sha256 in sent_sha256.items():
        found = found_sha256(name)
        if found != sha256:
            raise ExportError(
                f"{name} has sha256 {found[:12]} in {where}, its stage sent {sha256[:12]}; nothing was published: the "
                "disk or memory of this machine is failing"
            )
    return (
        "joined parts",
        f"all {len(sent_sha256)} {what}, each once and finite, read back from the disk with the sha256 that its stage "
        f"sent; {format_size(num_bytes)}",
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
