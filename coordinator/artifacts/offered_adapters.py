"""Adapters on their way to a job's workers, which do not see this machine's folders: read, and handed out in bulk."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from coordinator.artifacts.publish import ADAPTER_CONFIG
from coordinator.artifacts.shadows import ShadowStore
from plutino.errors import ConfigError
from plutino.job.adapter_method import ADAPTER_TENSORS_FILE
from plutino.job.assignment import StoredAdapter, StoredRewardAdapter
from plutino.job.objective import GrpoConfig
from plutino.job.spec import JobSpec
from plutino.types import JobId


def offer_initial_adapter(spec: JobSpec, job_id: JobId, shadows: ShadowStore) -> StoredAdapter | None:
    """Hand out the adapter that a job starts from; a repeated call changes nothing. None: it starts fresh.

    Raises:
        ConfigError: it is not there.
    """
    folder = spec.training.init_adapter
    if folder is None:
        return None
    path = Path(folder) / ADAPTER_TENSORS_FILE
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"training.init_adapter: cannot read {path}: {error.strerror}; name the folder of an adapter"
        ) from error
    return _stored(data, "initial", job_id, shadows)


def offer_reward_adapter(spec: JobSpec, job_id: JobId, shadows: ShadowStore) -> StoredRewardAdapter | None:
    """Hand out the adapter that scores what a job samples; a repeated call changes nothing. None: there is none.

    Raises:
        ConfigError: its folder has no adapter that gives rewards.
    """
    objective = spec.objective
    if not isinstance(objective, GrpoConfig) or not objective.reward_adapters:
        return None
    folder = Path(objective.reward_adapters[0].path)
    try:
        data = (folder / ADAPTER_TENSORS_FILE).read_bytes()
        config_json = (folder / ADAPTER_CONFIG).read_text(encoding="utf-8")
        task_type = json.loads(config_json).get("task_type")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the reward adapter in {folder} cannot be read: {error}; name the folder that a job with objective.type: "
            "reward has published"
        ) from error
    if task_type != "SEQ_CLS":
        raise ConfigError(
            f"the adapter in {folder} gives no rewards (task_type {task_type}); train one with objective.type: reward"
        )
    return StoredRewardAdapter(tensors=_stored(data, "reward", job_id, shadows), config_json=config_json)


def _stored(data: bytes, what: str, job_id: JobId, shadows: ShadowStore) -> StoredAdapter:
    sha256 = hashlib.sha256(data).hexdigest()
    shadow_id = f"{what}-{sha256[:16]}"
    if not shadows.holds(job_id, shadow_id, sha256):
        with shadows.receive(job_id, shadow_id, sha256, len(data)) as incoming:
            incoming.write(data)
            incoming.publish()
    return StoredAdapter(shadow_id=shadow_id, sha256=sha256)
