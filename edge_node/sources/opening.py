"""From an assignment, and what the device allows, to the weights of one worker."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from edge_node.cache import BlobCache, OverBudgetError
from edge_node.sources.base import ByteSource
from edge_node.sources.coordinator import CoordinatorSource
from edge_node.sources.device import DeviceSource
from edge_node.sources.hub import HubSource
from edge_node.sources.shared import Progress, SharedWeights
from edge_node.stage.random_source import RandomSource
from edge_node.stage.weights import DTYPES
from edge_node.weights_config import WeightsConfig
from plutino.job.assignment import WorkerAssignment
from plutino.manifest import Manifest
from plutino.random_weights import seed_of
from plutino.security.tls import Credentials
from plutino.wire.bulk import BulkClient


def open_weights(
    assignment: WorkerAssignment,
    config: WeightsConfig,
    bulk: BulkClient,
    *,
    credentials: Credentials | None,
    on_progress: Callable[[Progress], None],
) -> SharedWeights:
    """The weights of a worker's job, wherever they are; close them when the job is over.

    Raises:
        ModelError: the manifest cannot be read.
        FrameError: the model was changed after the job began.
        UnreachableError: the coordinator's bulk process does not answer.
    """
    cache = config.cache()
    manifest = _manifest(assignment, cache, bulk)
    folder = Path(assignment.spec.model.path)
    sources: list[ByteSource] = []
    if manifest.origin is not None and config.uses_hub:
        sources.append(HubSource(manifest.origin))
    sources += [DeviceSource(device, assignment.job_id, credentials) for device in assignment.caches]
    sources.append(CoordinatorSource(bulk, assignment.job_id))
    return SharedWeights(
        manifest,
        folders=[folder] if config.uses_folders and folder.is_dir() else [],
        cache=cache,
        sources=sources,
        on_progress=on_progress,
        first_share=assignment.replica_index / assignment.shape.num_replicas,
    )


def open_packed(
    assignment: WorkerAssignment,
    config: WeightsConfig,
    bulk: BulkClient,
    manifest: Manifest,
    *,
    credentials: Credentials | None,
    on_progress: Callable[[Progress], None],
) -> SharedWeights | None:
    """The packed tensors that the coordinator made, cached and shared like any others; None: it made none."""
    if not manifest.packed:
        return None
    devices = [DeviceSource(device, assignment.job_id, credentials) for device in assignment.caches]
    return SharedWeights(
        Manifest(manifest.config_json, manifest.packed, manifest.sha256),
        cache=config.cache(),
        # The hub knows nothing of them.
        sources=[*devices, CoordinatorSource(bulk, assignment.job_id)],
        on_progress=on_progress,
        first_share=assignment.replica_index / assignment.shape.num_replicas,
    )


def drawn_source(manifest: Manifest, device: torch.device) -> RandomSource | None:
    """A model whose weights are drawn on this very device; None: they are stored somewhere."""
    seed = seed_of(manifest.tensors)
    if seed is None:
        return None
    dtype = next(DTYPES[entry.dtype] for entry in manifest.tensors.values())
    return RandomSource(manifest.config, seed=seed, dtype=dtype, device=device)


def _manifest(assignment: WorkerAssignment, cache: BlobCache, bulk: BulkClient) -> Manifest:
    key = assignment.manifest_sha256
    if (known := cache.check(key)) is not None:
        return Manifest.from_bytes(known.read_bytes())
    data = bulk.manifest(assignment.job_id, key)
    try:
        with cache.receive(key, len(data)) as incoming:
            if incoming.path is None:
                incoming.restart()
                incoming.write(data)
                incoming.publish()
    except OverBudgetError:
        pass  # asked for again next time
    return Manifest.from_bytes(data)
