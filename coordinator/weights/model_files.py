"""Which files of which base model a job's workers may read.

The coordinator offers a model folder to a job by writing ``jobs/<job_id>/model.json`` and ``manifest.json`` below the
state directory; the bulk process reads them for every call. Only plain names of the kinds a worker needs are ever
served, whatever the registration or a request says.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from plutino.errors import ConfigError, ModelError, UnknownJobError
from plutino.manifest import HubOrigin, Manifest, make_manifest, with_packed
from plutino.random_weights import RANDOM_FILE

_SERVED = re.compile(
    r"config\.json|generation_config\.json"
    r"|[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors|model\.safetensors\.index\.json"
    r"|tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|chat_template\.(jinja|json)"
    r"|vocab\.(json|txt)|merges\.txt|tokenizer\.model|spiece\.model|sentencepiece\.bpe\.model",
    re.ASCII,
)


def is_served(file_name: str) -> bool:
    """Whether a file of this name is of a kind that workers may read; a name with a path in it never is."""
    return len(file_name) <= 255 and _SERVED.fullmatch(file_name) is not None


def offer_model(
    job_dir: Path, model_dir: Path, *, origin: HubOrigin | None = None, packed_dir: Path | None = None
) -> Manifest:
    """Let a job's workers read a model folder, and write down its manifest; replaces what was offered earlier.

    ``packed_dir`` holds packed tensors of the model, which are offered beside it.

    The first time all weights are hashed, which takes seconds per GB.

    Raises:
        ModelError: the folder is no readable model folder.
    """
    manifest = make_manifest(model_dir, origin=origin)
    if packed_dir is not None:
        manifest = with_packed(manifest, packed_dir)
    register_model(job_dir, model_dir, packed_dir)
    _write(job_dir / "manifest.json", manifest.to_bytes())
    return manifest


def manifest_path(job_dir: Path) -> Path:
    """Where the manifest of a job's model lies.

    Raises:
        UnknownJobError: the job offers no model.
    """
    path = job_dir / "manifest.json"
    if not path.is_file():
        raise UnknownJobError(f"job {job_dir.name} offers no model here")
    return path


def register_model(job_dir: Path, model_dir: Path, packed_dir: Path | None = None) -> ModelFiles:
    """Let a job's workers read the files of a model folder, and the weights of a folder of packed tensors.

    Raises:
        ModelError: the folder has no config.json or no safetensors file.
    """
    names = tuple(sorted(path.name for path in model_dir.iterdir() if path.is_file() and is_served(path.name)))
    has_weights = any(name.endswith(".safetensors") for name in names) or (model_dir / RANDOM_FILE).is_file()
    if "config.json" not in names or not has_weights:
        raise ModelError(
            f"{model_dir} is no model folder that can be served: it needs config.json and *.safetensors, "
            f"found {', '.join(names) or 'neither'}"
        )
    packed = () if packed_dir is None else tuple(sorted(path.name for path in packed_dir.glob("*.safetensors")))
    if packed_dir is not None and not packed:
        raise ModelError(f"{packed_dir} holds no packed tensors; submit the job again")
    if both := set(names) & set(packed):
        raise ModelError(f"{min(both)} is in {model_dir} and in {packed_dir}; rename the model's file")
    folders = {name: str(model_dir.resolve()) for name in names}
    if packed_dir is not None:
        folders |= {name: str(packed_dir.resolve()) for name in packed}
    _write(job_dir / "model.json", json.dumps({"folders": folders}).encode())
    return ModelFiles({name: Path(folder) for name, folder in folders.items()})


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(data)
    os.replace(part, path)


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The registered files of a model that are served."""

    folders: Mapping[str, Path]
    """Where each file lies, by its name."""

    @property
    def names(self) -> frozenset[str]:
        """All of them."""
        return frozenset(self.folders)

    @classmethod
    def of_job(cls, job_dir: Path) -> ModelFiles:
        """Read a job's registration.

        Raises:
            UnknownJobError: the job registered no model.
            ModelError: the registration is malformed.
        """
        try:
            registration = json.loads((job_dir / "model.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UnknownJobError(f"job {job_dir.name} has registered no model here") from None
        except ValueError as error:
            raise ModelError(f"{job_dir / 'model.json'} is not JSON ({error}); submit the job again") from error
        match registration:
            case {"folders": dict(folders)} if all(isinstance(folder, str) for folder in folders.values()):
                return cls({name: Path(folder) for name, folder in folders.items() if is_served(name)})
            case _:
                raise ModelError(f"{job_dir / 'model.json'} does not tell its files' folders; submit the job again")

    def path(self, file_name: str) -> Path:
        """Path of a served file.

        Raises:
            ConfigError: the file is not one that is served.
        """
        if file_name not in self.folders:
            raise ConfigError(
                f"{file_name[:140]!r} is not served; the job's model has {len(self.names)} files that are: "
                f"{', '.join(sorted(self.names)[:8])}"
            )
        # Not resolved and compared with the folder: model caches keep their files as links to blobs elsewhere.
        return self.folders[file_name] / file_name

    def check_range(self, file_name: str, start_byte: int, end_byte: int) -> Path:
        """Path of a file that has the half-open byte range.

        Raises:
            ConfigError: the file is not served, or the range is not within it.
            ModelError: the file is gone.
        """
        path = self.path(file_name)
        size_bytes = self._size_bytes(file_name)
        if not 0 <= start_byte <= end_byte <= size_bytes:
            raise ConfigError(f"bytes [{start_byte}, {end_byte}) are not within {file_name}, which has {size_bytes}")
        return path

    def _size_bytes(self, name: str) -> int:
        try:
            return (self.folders[name] / name).stat().st_size
        except FileNotFoundError:
            raise ModelError(f"{self.folders[name] / name} is gone; put it back, or submit the job again") from None
