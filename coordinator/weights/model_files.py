"""Which files of which base model a job's workers may read.

The coordinator registers a model folder for a job by writing ``jobs/<job_id>/model.json`` below the state directory;
the bulk process reads it for every call. Only plain names of the kinds a worker needs are ever served, whatever the
registration or a request says.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from plutino.errors import ConfigError, ModelError, UnknownJobError

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


def register_model(job_dir: Path, model_dir: Path) -> ModelFiles:
    """Let a job's workers read a model folder; replaces an earlier registration.

    Raises:
        ModelError: the folder has no config.json or no safetensors file.
    """
    names = tuple(sorted(path.name for path in model_dir.iterdir() if path.is_file() and is_served(path.name)))
    if "config.json" not in names or not any(name.endswith(".safetensors") for name in names):
        raise ModelError(
            f"{model_dir} is no model folder that can be served: it needs config.json and *.safetensors, "
            f"found {', '.join(names) or 'neither'}"
        )
    job_dir.mkdir(parents=True, exist_ok=True)
    part = job_dir / "model.json.part"
    part.write_text(json.dumps({"path": str(model_dir.resolve()), "files": names}), encoding="utf-8")
    os.replace(part, job_dir / "model.json")
    return ModelFiles(model_dir.resolve(), frozenset(names))


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A registered model folder and the names in it that are served."""

    folder: Path
    names: frozenset[str]

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
            case {"path": str(folder), "files": [*names]} if all(isinstance(name, str) for name in names):
                return cls(Path(folder), frozenset(name for name in names if is_served(name)))
            case _:
                raise ModelError(f"{job_dir / 'model.json'} lacks path or files; submit the job again")

    def path(self, file_name: str) -> Path:
        """Path of a served file.

        Raises:
            ConfigError: the file is not one that is served.
        """
        if file_name not in self.names:
            raise ConfigError(
                f"{file_name[:140]!r} is not served; the job's model has {len(self.names)} files that are: "
                f"{', '.join(sorted(self.names)[:8])}"
            )
        # Not resolved and compared with the folder: model caches keep their files as links to blobs elsewhere.
        return self.folder / file_name

    def sizes(self) -> dict[str, int]:
        """Bytes of every served file, by name, sorted.

        Raises:
            ModelError: a registered file is gone.
        """
        return {name: self._size_bytes(name) for name in sorted(self.names)}

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
            return (self.folder / name).stat().st_size
        except FileNotFoundError:
            raise ModelError(f"{self.folder / name} is gone; put it back, or submit the job again") from None
