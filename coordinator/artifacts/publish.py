"""Makes a staged adapter visible: whole, with its card, by one rename.

Folders beside the destination, on the same file system::

    <output>                      the adapter; absent, or an earlier result of the same job (its plutino.json says so)
    .plutino-<job_id>-staging     verified, not visible yet
    .plutino-<job_id>-previous    the job's earlier result, while it is swapped out

Entry points: :func:`publish_adapter`, which may be repeated after a crash at any line, and :func:`check_output_dir`.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from coordinator.artifacts.card import CardFacts, render_card
from coordinator.artifacts.durable import sync_dir, write_durable
from coordinator.artifacts.shadows import check_name, file_sha256
from plutino.errors import ConfigError, ExportError

logger = logging.getLogger(__name__)

ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
CARD_FILE = "README.md"
RECORD_FILE = "plutino.json"
"""Says which job published the folder, and every fact of the card for programs."""

_SHOWN_NAMES = 3


class PublishRequest(BaseModel):
    """Which staged adapter goes where."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    job_id: str
    step: int
    """Optimiser steps behind the adapter."""
    staging_dir: str
    output_dir: str
    adapter_sha256: str
    """Of the adapter_model.safetensors that was verified."""
    model_files: dict[str, str] = {}
    """Of a whole model in an adapter's place: sha256 of each of its files by name, as they were verified."""
    card: CardFacts

    @property
    def files(self) -> dict[str, str]:
        """sha256 of every staged file of weights, by name."""
        return self.model_files or {ADAPTER_FILE: self.adapter_sha256}


class PublishedAdapter(BaseModel):
    """An adapter that is visible, whole."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    output_dir: str
    step: int
    adapter_sha256: str
    adapter_bytes: int
    """Size of its weights."""


def staging_dir_of(output_dir: Path, job_id: str) -> Path:
    """Where a job's adapter lies before it is visible."""
    return output_dir.parent / f".plutino-{check_name('job id', job_id)}-staging"


def check_output_dir(output_dir: Path, job_id: str) -> None:
    """Refuse a destination that holds anything but an earlier result of this job.

    Raises:
        ConfigError: it does; the message names the folder and the way out.
    """
    if not os.path.lexists(output_dir):
        return
    way_out = "set output.dir to a folder that does not exist yet, or move this one away"
    if output_dir.is_symlink() or not output_dir.is_dir():
        raise ConfigError(f"{output_dir} exists and is no folder; nothing was published: {way_out}")
    owner = _record(output_dir).get("job_id")
    if owner == job_id:
        return
    names = sorted(path.name for path in output_dir.iterdir())
    what = f"the result of job {owner}" if owner else f"no result of plutino ({_shown(names)})"
    raise ConfigError(f"{output_dir} is {what}, not an earlier one of job {job_id}; nothing was published: {way_out}")


def publish_adapter(request: PublishRequest) -> PublishedAdapter:
    """Write card and record into the staged folder and rename it to its destination.

    A reader of the destination finds the earlier result, nothing, or the whole new one.

    Raises:
        ConfigError: the destination holds something else; the staged adapter stays, so that the call can be repeated.
        ExportError: the staged adapter is gone or is not the one that was verified, or the disk failed.
    """
    output_dir, staging_dir = Path(request.output_dir), Path(request.staging_dir)
    previous_dir = output_dir.parent / f".plutino-{check_name('job id', request.job_id)}-previous"
    check_output_dir(output_dir, request.job_id)
    try:
        if staging_dir.is_dir():
            _complete(staging_dir, request)
            # Once more, as late as can be: hashing and writing took a while.
            check_output_dir(output_dir, request.job_id)
            _swap(staging_dir, output_dir, previous_dir)
        else:
            _require_published(output_dir, previous_dir, request)
        _remove(previous_dir)
        adapter_bytes = sum((output_dir / name).stat().st_size for name in request.files)
    except OSError as error:
        raise ExportError(
            f"the adapter cannot be published at {output_dir}: {error}; it is staged at {staging_dir}: mend the "
            "folder's access or room, then export again"
        ) from error
    return PublishedAdapter(
        output_dir=str(output_dir),
        step=request.step,
        adapter_sha256=request.adapter_sha256,
        adapter_bytes=adapter_bytes,
    )


def _complete(staging_dir: Path, request: PublishRequest) -> None:
    """Add card and record to what was staged, durably."""
    for name, sha256 in request.files.items():
        found = file_sha256(staging_dir / name)
        if found != sha256:
            raise ExportError(
                f"{staging_dir / name} has sha256 {found[:12]}, verified was {sha256[:12]}; "
                "nothing was published: something changed the staged file, export again"
            )
    config_file = "config.json" if request.model_files else ADAPTER_CONFIG
    record = {
        "format": 1,
        "job_id": request.job_id,
        "step": request.step,
        "sha256": {
            **request.files,
            config_file: file_sha256(staging_dir / config_file),
        },
        "base_hash": request.card.base_hash,
        "facts": request.card.model_dump(mode="json"),
    }
    card = render_card(request.card, Path(request.output_dir).name)
    write_durable(staging_dir / CARD_FILE, card.encode())
    write_durable(staging_dir / RECORD_FILE, (json.dumps(record, indent=2) + "\n").encode())
    sync_dir(staging_dir)


def _swap(staging_dir: Path, output_dir: Path, previous_dir: Path) -> None:
    if output_dir.exists():
        if previous_dir.exists():  # an earlier swap ended before it was removed
            shutil.rmtree(previous_dir)
        output_dir.rename(previous_dir)
    try:
        # Fails on a folder that somebody has put there since the check, unless it is empty.
        staging_dir.rename(output_dir)
    except OSError:
        if previous_dir.exists() and not os.path.lexists(output_dir):
            previous_dir.rename(output_dir)
        raise
    sync_dir(output_dir.parent)


def _remove(previous_dir: Path) -> None:
    try:
        if previous_dir.exists():
            shutil.rmtree(previous_dir)
    except OSError as error:
        # The new result is visible by now, so this must not look like a failure to publish.
        logger.warning("the job's earlier result in %s could not be removed: %s", previous_dir, error)


def _require_published(output_dir: Path, previous_dir: Path, request: PublishRequest) -> None:
    """Nothing is staged: either this very call was carried out before, or the staged folder was lost."""
    if previous_dir.exists() and not output_dir.exists():
        previous_dir.rename(output_dir)
        sync_dir(output_dir.parent)
    published = _record(output_dir).get("sha256")
    if not isinstance(published, dict) or not request.files.items() <= published.items():
        raise ExportError(
            f"no adapter of job {request.job_id} is staged at {request.staging_dir}, and {output_dir} does not hold "
            f"the one of step {request.step} (sha256 {request.adapter_sha256[:12]}); nothing was published: "
            "export again"
        )


def _record(output_dir: Path) -> dict[str, Any]:
    """The folder's record; empty if it has none that can be read, which makes the folder somebody else's."""
    try:
        record = json.loads((output_dir / RECORD_FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _shown(names: list[str]) -> str:
    if not names:
        return "an empty folder"
    more = len(names) - _SHOWN_NAMES
    return "it holds " + ", ".join(names[:_SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")
