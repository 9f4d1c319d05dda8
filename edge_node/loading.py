"""How a worker's stage comes to be: weights opened and filled in, its part of the activation cache, its executor."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping

from safetensors.torch import load as load_safetensors

from edge_node.activation_cache.stage_cache import StageCache, namespace_of
from edge_node.activation_cache.store import ActivationStore
from edge_node.compute_device import ComputeDevice
from edge_node.engine.executor import StageExecutor
from edge_node.engine.optimizer import StageOptimizer
from edge_node.methods.base import AttachedMethod
from edge_node.methods.reward_adapter import RewardAdapter
from edge_node.network import DeviceNetwork
from edge_node.objectives.registry import OBJECTIVES
from edge_node.sources.opening import drawn_source, open_packed, open_weights
from edge_node.sources.shared import Progress, SharedWeights
from edge_node.stage.build import COMPUTE_DTYPES, build_stage
from edge_node.stage.packed_cache import PackedBlobs, ShippedMatrices
from edge_node.stage.packing import PackedCache
from edge_node.stage.stage import Stage
from edge_node.transport.base import Peer
from edge_node.transport.peer import PeerTransport
from edge_node.weights_config import WeightsConfig
from plutino.job.assignment import WorkerAssignment
from plutino.security.tls import Credentials
from plutino.types import JobId
from plutino.wire.bulk import BulkClient
from plutino.wire.messages import Bounds
from protos import workers_pb2 as pb

_PROGRESS_EVERY_S = 0.5
HELD = "held here"
"""Place of weights that the worker's job before left loaded."""


class LoadingClock:
    """Where the seconds of a worker's loading go, part by part."""

    def __init__(self) -> None:
        self._started_s = self._last_s = time.monotonic()
        self.seconds_by_part: dict[str, float] = {}

    @property
    def total_s(self) -> float:
        """Of all parts so far."""
        return self._last_s - self._started_s

    def end(self, part: str) -> None:
        """A part is over, and the next one begins."""
        now_s = time.monotonic()
        self.seconds_by_part[part] = now_s - self._last_s
        self._last_s = now_s


class StageLoading:
    """Builds a job's stage from its weights, and tells how far it is.

    Args:
        assignment: the worker's part of the job.
        config: what the device's owner allows for weights.
        device: where the stage computes.
        bulk: gives what is not on the device.
        credentials: for the other devices of the job.
        tell: takes the progress; called from several threads.
    """

    def __init__(
        self,
        assignment: WorkerAssignment,
        config: WeightsConfig,
        device: ComputeDevice,
        bulk: BulkClient,
        *,
        credentials: Credentials | None,
        tell: Callable[[pb.LoadProgress], None],
    ) -> None:
        self._assignment = assignment
        self._config = config
        self._device = device
        self._bulk = bulk
        self._credentials = credentials
        self._tell = tell
        self._weights: SharedWeights | None = None
        self._packed: SharedWeights | None = None
        self._stop_reason: str | None = None
        self._told_s = 0.0

    def stop(self, reason: str) -> None:
        """Let a :meth:`build` in progress fail; from any thread."""
        self._stop_reason = reason
        for weights in (self._weights, self._packed):
            if weights is not None:
                weights.stop(reason)

    def close(self) -> None:
        """Let go of the weights' files and connections."""
        for weights in (self._weights, self._packed):
            if weights is not None:
                weights.close()

    def build(self) -> Stage:
        """The stage, without an adapter."""
        assignment, config = self._assignment, self._config
        self._weights = open_weights(
            assignment, config, self._bulk, credentials=self._credentials, on_progress=self._on_progress
        )
        manifest = self._weights.manifest
        self._packed = open_packed(
            assignment, config, self._bulk, manifest, credentials=self._credentials, on_progress=self._on_progress
        )
        if self._stop_reason is not None:
            self.stop(self._stop_reason)
        drawn = drawn_source(manifest, self._device.torch)
        return build_stage(
            drawn or self._weights,
            assignment.shape.start_block,
            assignment.shape.end_block,
            dtype=COMPUTE_DTYPES[assignment.numerics.dtype],
            attention=assignment.numerics.attention,
            checkpointing=assignment.checkpointing,
            packing=assignment.numerics.packing,
            device=self._device.torch,
            cache=None if drawn else self._packed_cache(),
            has_lm_head=not assignment.spec.objective.has_score_head,
            has_backbone=not assignment.from_cache,
        )

    def bytes_by_place(self, stage: Stage) -> Mapping[str, int]:
        """Where the stage's bytes came from."""
        return {HELD: stage.bytes_read} if self._weights is None else self._progress().by_place

    def _packed_cache(self) -> PackedCache:
        own = PackedBlobs(self._config.cache(), self._assignment.base_hash)
        return own if self._packed is None else ShippedMatrices(own, self._packed)

    def _progress(self) -> Progress:
        """Of stored and of packed tensors together."""
        parts = [weights.progress for weights in (self._weights, self._packed) if weights is not None]
        by_place: Counter[str] = Counter()
        for part in parts:
            by_place.update(part.by_place)
        done, total = (sum(getattr(part, name) for part in parts) for name in ("done_bytes", "total_bytes"))
        return Progress(done, total, dict(by_place))

    def _on_progress(self, _: Progress) -> None:
        # From several threads: one event too many does no harm.
        now_s = time.monotonic()
        if now_s - self._told_s < _PROGRESS_EVERY_S:
            return
        self._told_s = now_s
        progress = self._progress()
        self._tell(
            pb.LoadProgress(
                done_bytes=progress.done_bytes,
                total_bytes=progress.total_bytes,
                bytes_by_place=progress.by_place,
            )
        )


def open_activations(
    assignment: WorkerAssignment, config: WeightsConfig, device: ComputeDevice, stage: Stage
) -> StageCache | None:
    """A stage's part of the activation cache; None: the job asks for none."""
    codec = assignment.spec.training.activation_cache
    if codec == "off":
        return None
    namespace = namespace_of(
        assignment.base_hash,
        assignment.numerics.model_dump_json(
            exclude={"micro_batch_size", "micro_batch_cut", "threads_per_worker", "arithmetic"}
        ),
        assignment.threads,
        device.torch,
        codec,
    )
    store = ActivationStore(config.activation_dir, config.activation_bytes) if config.activation_bytes else None
    return StageCache(store, namespace, stage, codec)


def make_executor(
    assignment: WorkerAssignment, stage: Stage, method: AttachedMethod, me: Peer, activations: StageCache | None
) -> StageExecutor:
    """The stage with its adapter, optimiser and objective; without a transport yet."""
    spec, numerics, shape = assignment.spec, assignment.numerics, assignment.shape
    stage.round_at(numerics.bf16_borders)
    return StageExecutor(
        stage=stage,
        method=method,
        objective=OBJECTIVES[spec.objective.type](spec.objective),
        optimizer=StageOptimizer(method.parameters, spec.training, assignment.total_steps),
        transport=None,
        stages=assignment.stages,
        me=me,
        seed=spec.training.seed,
        codec_above=numerics.codec_at(shape.start_block),
        codec_below=numerics.codec_at(shape.end_block),
        first_trainable_stage=assignment.first_trainable_stage,
        activation_cache=activations,
        entry_owners=[Peer(*owner) for owner in assignment.entry_owners],
        unfreezing=spec.method.unfreezing,
        replicas_fold=numerics.replicas_fold,
        sums=numerics.sums,
    )


def open_transport(
    assignment: WorkerAssignment,
    network: DeviceNetwork,
    *,
    bounds: Bounds,
    is_for_card: bool,
    on_peer_lost: Callable[[Peer, str], None],
) -> PeerTransport | None:
    """A worker's end of its data streams; None: it has no peers.

    Raises:
        ConfigError: the device's address cannot be listened on.
        SecurityError: it is not on loopback, and the device has no identity.
    """
    if len(assignment.stages) == 1 and assignment.shape.num_replicas == 1:
        return None
    return PeerTransport(
        job_id=JobId(assignment.job_id),
        plan_epoch=assignment.plan_epoch,
        own=Peer(assignment.stage_index, assignment.replica_index),
        listen_address=f"{network.listen_host}:0",
        credentials=network.credentials(),
        advertised_host=network.advertised_host,
        bounds=bounds,
        is_for_card=is_for_card,
        on_peer_lost=on_peer_lost,
    )


def open_reward_adapter(assignment: WorkerAssignment, stage: Stage, bulk: BulkClient) -> RewardAdapter | None:
    """What scores the job's samples beside its own adapter; None: nothing does.

    Raises:
        ConfigError: it cannot be used on this model.
    """
    stored = assignment.reward_adapter
    if stored is None:
        return None
    tensors = bulk.get_shadow(assignment.job_id, stored.tensors.shadow_id, stored.tensors.sha256)
    return RewardAdapter(stage, stored.config_json, load_safetensors(bytes(tensors)))
