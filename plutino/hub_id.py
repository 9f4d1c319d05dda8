"""Names of models on the hub, and where the coordinator keeps its copy of one."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_HUB_ID = re.compile(rf"(?P<repository>{_PART}/{_PART})(@(?P<revision>[A-Za-z0-9][A-Za-z0-9._/-]{{0,127}}))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}", re.ASCII)

HEADERS = "headers"
"""Subfolder of a hub model's folder: the headers of its safetensors files alone, in files of their full length."""


@dataclass(frozen=True, slots=True)
class HubId:
    """A model on the hub: ``organisation/name``, of a branch, a tag or a commit."""

    repository: str
    revision: str = "main"

    @property
    def is_pinned(self) -> bool:
        """Whether the revision is a commit, which never changes."""
        return _COMMIT.fullmatch(self.revision) is not None

    def __str__(self) -> str:
        return f"{self.repository}@{self.revision}"


def parse_hub_id(model_path: str) -> HubId | None:
    """The hub model that a ``model.path`` names; None if it is a folder's path."""
    match = _HUB_ID.fullmatch(model_path)
    if match is None or ".." in model_path:
        return None
    return HubId(match["repository"], match["revision"] or "main")


def default_hub_dir() -> Path:
    """Where this user's copies of hub models lie, by the XDG rules."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "plutino" / "hub"


def model_folder(model_path: str) -> Path:
    """The folder with the model's files on this machine: the path itself, or where a hub model is kept."""
    hub_id = parse_hub_id(model_path)
    if hub_id is None:
        return Path(model_path)
    return default_hub_dir() / hub_id.repository.replace("/", "--") / hub_id.revision.replace("/", "--")


def index_folder(folder: Path) -> Path:
    """Where the headers of a model's tensors can be read: beside the weights, or what was fetched before them."""
    return folder / HEADERS if (folder / HEADERS).is_dir() else folder
