"""One worker's life with one job: load the stage, link up, run units as they come, vote, commit, shadow, end.

The compute thread runs :meth:`WorkerSession.run`. Commands come on the control stream's thread into the inbox; shadows
are uploaded on a thread of their own.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

import torch
from safetensors.torch import load as load_safetensors

from edge_node.activation_cache.stage_cache import CacheCounts, StageCache, namespace_of
from edge_node.activation_cache.store import ActivationStore
from edge_node.compute_device import CPU, ComputeDevice
from edge_node.control import ControlStream
from edge_node.engine.executor import StageExecutor, StepOutcome
from edge_node.engine.generate import GenerateOptions, generate
from edge_node.engine.optimizer import StageOptimizer
from edge_node.inbox import CommandTask, Inbox, UnitTask
from edge_node.methods.score_head import attach_method
from edge_node.network import DeviceNetwork
from edge_node.objectives.registry import OBJECTIVES
from edge_node.shadowing import ShadowWriter
from edge_node.sources.opening import drawn_source, open_weights
from edge_node.sources.shared import Progress, SharedWeights
from edge_node.stage.build import COMPUTE_DTYPES, Stage, build_stage
from edge_node.stage.packed_cache import PackedBlobs
from edge_node.stage.resident import ResidentStage
from edge_node.stage.verify import part_difference
from edge_node.transport.base import Peer, UnitCancelledError
from edge_node.transport.peer import PeerTransport
from edge_node.weights_config import WeightsConfig
from plutino.data.batches import MicroBatchRows
from plutino.errors import OutOfMemoryError, PeerLostError
from plutino.job.assignment import WorkerAssignment
from plutino.types import JobId, Unit, UnitKind
from plutino.wire.bulk import BulkClient
from plutino.wire.convert import micro_batch_from_proto, row_values_to_proto, unit_to_proto, worker_to_proto
from plutino.wire.messages import Bounds
from protos import workers_pb2 as pb

logger = logging.getLogger(__name__)

_METADATA_BYTES = 1 << 20
_PROGRESS_EVERY_S = 0.5
HELD = "held here"
"""Place of weights that the worker's job before left loaded."""


class WorkerSession:
    """Runs one stage of one job until the coordinator says that it is over."""

    def __init__(
        self,
        assignment: WorkerAssignment,
        network: DeviceNetwork | None = None,
        weights: WeightsConfig | None = None,
        device: ComputeDevice = CPU,
        resident: ResidentStage | None = None,
    ) -> None:
        """``resident`` is a stage that an earlier job left here; one of another key is not used."""
        self._assignment = assignment
        self._held = resident if resident is not None and resident.key == assignment.stage_key else None
        self._resident: ResidentStage | None = None
        self._device = device
        self._network = network or DeviceNetwork()
        self._credentials = self._network.credentials()
        self._weights_config = weights or WeightsConfig()
        self._weights: SharedWeights | None = None
        self._end_reason: str | None = None
        self._progress_told_s = 0.0
        self._me = Peer(assignment.stage_index, assignment.replica_index)
        self._next_step = assignment.restore.step if assignment.restore else 0
        self._is_loaded = False
        self._is_linked = False
        self._commit_s = 0.0
        self._finish_reason = "the coordinator did not come back"
        self._vocab_size = 0
        self._inbox = Inbox(reads_rows=self._reads_rows, decode_rows=self._decode_rows)
        self._inbox.start_at(self._next_step)
        self._transport: PeerTransport | None = None
        self._control = ControlStream(
            self._network.reached(assignment.coordinator_address),
            credentials=self._credentials,
            hello=self._hello,
            on_command=self._on_command,
            on_orphaned=lambda: self.end("no coordinator for too long"),
        )
        self._bulk = BulkClient(self._network.reached(assignment.bulk_address), self._credentials)
        self._shadows = ShadowWriter(assignment.ref, self._bulk, on_stored=self._on_shadow_stored)
        self._executor: StageExecutor | None = None
        self._activations: StageCache | None = None

    def end(self, reason: str) -> None:
        """End as if the coordinator had said so; from any thread."""
        self._finish_reason = self._end_reason = reason
        self._inbox.finish(reason)
        if self._weights is not None:
            self._weights.stop(reason)
        if self._transport is not None:
            self._transport.close()

    def run(self) -> str:
        """Run until the end; gives the reason of the end.

        Raises:
            PlutinoError: the job cannot go on here; the coordinator has been told.
        """
        self._control.start()
        try:
            self._load()
            while (task := self._inbox.take()) is not None:
                match task:
                    case UnitTask():
                        self._run_unit(task)
                    case CommandTask(command):
                        self._run_command(command)
                self._check_memory()
            return self._finish_reason
        except Exception as error:
            if self._end_reason is not None and not self._is_loaded:
                return self._end_reason  # what was stopped half-way is no failure
            failure = as_plutino_error(error, self._assignment)
            self._send(pb.WorkerEvent(failed=pb.WorkerFailed(error=type(failure).__name__, reason=str(failure))))
            raise failure from error
        finally:
            if self._weights is not None:
                self._weights.close()
            if self._activations is not None:
                self._activations.close()
            self._shadows.close()
            self._control.close()
            if self._transport is not None:
                self._transport.close()

    def take_stage(self) -> ResidentStage | None:
        """After :meth:`run`: the stage as it was loaded, if the job asks to keep it and nothing changed its weights."""
        resident, self._resident, self._executor = self._resident, None, None
        if resident is None or not self._assignment.keeps_stage_s or not resident.restore():
            return None
        return resident

    # ---- loading ----

    def _load(self) -> None:
        started_s = time.monotonic()
        assignment = self._assignment
        spec = assignment.spec
        held, self._held = self._held, None
        stage = self._build_stage() if held is None else held.stage
        self._resident = held or ResidentStage(stage, assignment.stage_key)
        self._vocab_size = int(stage.config.vocab_size)
        method = attach_method(stage, spec)
        if spec.training.init_adapter is not None:
            method.load(load_safetensors((Path(spec.training.init_adapter) / "adapter_model.safetensors").read_bytes()))
        optimizer = StageOptimizer(method.parameters, spec.training, assignment.total_steps)
        self._activations = self._open_activations(stage)
        self._executor = StageExecutor(
            stage=stage,
            method=method,
            objective=OBJECTIVES[spec.objective.type](spec.objective),
            optimizer=optimizer,
            transport=None,
            stages=assignment.stages,
            me=self._me,
            seed=spec.training.seed,
            codec=assignment.numerics.codecs,
            first_trainable_stage=assignment.first_trainable_stage,
            activation_cache=self._activations,
            unfreezing=spec.method.unfreezing,
        )
        self._transport = self._open_transport(stage)
        if self._transport is not None:
            self._executor.use(self._transport)
        if assignment.restore is not None:
            self._restore(assignment.restore.shadows)
        self._check_memory()
        self._is_loaded = True
        loaded = pb.StageLoaded(
            bytes_read=stage.bytes_read if held is None else 0,
            tensors_read=stage.tensors_read if held is None else 0,
            seconds=time.monotonic() - started_s,
            rss_bytes=self._device.held_bytes(),
            parameter_names=[p.name for p in method.parameters],
            trainable_parameters=sum(p.uses[0][1].numel() for p in method.parameters),
            data_address="" if self._transport is None else self._transport.address,
            adapter_config_json=json.dumps(method.peft_config(), sort_keys=True),
            bytes_by_place={HELD: stage.bytes_read} if self._weights is None else self._weights.progress.by_place,
        )
        self._send(pb.WorkerEvent(loaded=loaded), keep_as="loaded")

    def _open_activations(self, stage: Stage) -> StageCache | None:
        codec = self._assignment.spec.training.activation_cache
        if codec == "off":
            return None
        numerics = self._assignment.numerics
        namespace = namespace_of(
            self._assignment.base_hash,
            numerics.model_dump_json(include={"dtype", "packing", "attention", "versions"}),
            self._assignment.threads,
            self._device.torch,
            codec,
        )
        allowed = self._weights_config
        store = ActivationStore(allowed.activation_dir, allowed.activation_bytes) if allowed.activation_bytes else None
        return StageCache(store, namespace, stage, codec)

    def _build_stage(self) -> Stage:
        assignment = self._assignment
        self._weights = open_weights(
            assignment, self._weights_config, self._bulk, credentials=self._credentials, on_progress=self._tell_progress
        )
        if self._end_reason is not None:
            self._weights.stop(self._end_reason)
        drawn = drawn_source(self._weights.manifest, self._device.torch)
        return build_stage(
            drawn or self._weights,
            assignment.shape.start_block,
            assignment.shape.end_block,
            dtype=COMPUTE_DTYPES[assignment.numerics.dtype],
            attention=assignment.numerics.attention,
            checkpointing=assignment.checkpointing,
            packing=assignment.numerics.packing,
            device=self._device.torch,
            cache=None if drawn else PackedBlobs(self._weights_config.cache(), assignment.base_hash),
            has_lm_head=not assignment.spec.objective.has_score_head,
        )

    def _tell_progress(self, progress: Progress) -> None:
        # From several threads: one event too many does no harm.
        now_s = time.monotonic()
        if now_s - self._progress_told_s < _PROGRESS_EVERY_S or self._is_loaded:
            return
        self._progress_told_s = now_s
        self._send(
            pb.WorkerEvent(
                load_progress=pb.LoadProgress(
                    done_bytes=progress.done_bytes,
                    total_bytes=progress.total_bytes,
                    bytes_by_place=progress.by_place,
                )
            )
        )

    def _open_transport(self, stage: Stage) -> PeerTransport | None:
        assignment = self._assignment
        if len(assignment.stages) == 1 and assignment.shape.num_replicas == 1:
            return None
        # Hidden states with their metadata, or gradients that several workers add up.
        num_tokens = self._max_tokens() + assignment.spec.method.prompt_tokens
        hidden_bytes = 4 * stage.boundary_width * self._max_rows() * num_tokens
        largest_bytes = max(hidden_bytes, self.executor.largest_gradient_bytes) + _METADATA_BYTES
        return PeerTransport(
            job_id=JobId(assignment.job_id),
            plan_epoch=assignment.plan_epoch,
            own=self._me,
            listen_address=f"{self._network.listen_host}:0",
            credentials=self._credentials,
            advertised_host=self._network.advertised_host,
            bounds=Bounds(max_message_bytes=largest_bytes, max_inbox_bytes=4 * largest_bytes),
            on_peer_lost=self._on_peer_lost,
        )

    def _restore(self, shadows: dict[str, str]) -> None:
        tensors: dict[str, torch.Tensor] = {}
        for shadow_id, sha256 in shadows.items():
            tensors |= load_safetensors(bytes(self._bulk.get_shadow(self._assignment.job_id, shadow_id, sha256)))
        self.executor.optimizer.restore(tensors)

    @property
    def executor(self) -> StageExecutor:
        """The loaded stage."""
        assert self._executor is not None, "commands other than Finish come after StageLoaded"
        return self._executor

    # ---- units ----

    def _run_unit(self, task: UnitTask) -> None:
        unit = task.work.unit
        try:
            if unit.kind == UnitKind.TRAIN:
                self._train(task)
                return
            done = pb.UnitDone(unit=unit_to_proto(unit))
            if unit.kind == UnitKind.EVALUATE:
                done.loss_sum, values = self.executor.evaluate_rows(task.work)
                done.row_values.extend(row_values_to_proto(m, of_rows.numpy()) for m, of_rows in values.items())
            else:
                done.rows.extend(self._generate(task))
        except UnitCancelledError:
            done = pb.UnitDone(unit=unit_to_proto(unit), cancelled=True)
        except PeerLostError as error:
            logger.warning("%s stopped: %s", unit, error)
            return  # the coordinator fences this plan epoch and ends the worker
        self._finish_unit(unit)
        self._send(pb.WorkerEvent(unit_done=done), keep_as="unit_done")

    def _train(self, task: UnitTask) -> None:
        step = task.work.unit.serial
        outcome = self.executor.train_step(task.work)
        voted_s = time.perf_counter()
        self._send(pb.WorkerEvent(step_ready=self._vote(step, outcome)), keep_as="step_ready")
        decision = self._inbox.wait_decision(step)
        self._commit_s = time.perf_counter() - voted_s
        if decision is None:
            return
        if isinstance(decision, pb.Commit):
            self.executor.commit(step, decision.clip_scale)
        else:
            self.executor.drop()
        self._next_step = step + 1
        self._inbox.start_at(self._next_step)
        self._control.forget("step_ready")
        self._finish_unit(task.work.unit)
        if isinstance(decision, pb.Commit) and decision.shadow:
            self._write_shadow()

    def _write_shadow(self) -> None:
        # All replicas of a stage hold the same state to the bit: one copy is enough for all of them.
        if self._me.replica_index == 0:
            self._shadows.write(self._next_step, self.executor.snapshot())

    def _vote(self, step: int, outcome: StepOutcome) -> pb.StepReady:
        transport = self._transport
        counts = CacheCounts() if self._activations is None else self._activations.counts
        return pb.StepReady(
            plan_epoch=self._assignment.plan_epoch,
            step=step,
            squared_norms=outcome.squared_norms,
            finite=outcome.is_finite,
            loss_sum=outcome.loss_sum,
            reason=outcome.reason,
            times=pb.StepTimes(
                total_s=outcome.times.total_s,
                compute_s=outcome.times.compute_s,
                wait_s=outcome.times.wait_s,
                serialise_s=outcome.times.send_s + (0.0 if transport is None else transport.usage.encode_s),
                commit_s=self._commit_s,
                sent_bytes=0 if transport is None else transport.usage.sent_bytes,
                rss_bytes=self._device.held_bytes(),
                peak_rss_bytes=self._device.peak_bytes(),
                cached_rows=counts.rows_read,
                left_out_rows=counts.rows_left_out,
                damaged_entries=0 if self._activations is None else self._activations.num_damaged,
            ),
        )

    def _generate(self, task: UnitTask) -> list[pb.TokenRow]:
        if task.generate is None:
            return []  # the first replica of every stage generates; the others got a header alone
        options = GenerateOptions(
            max_new_tokens=task.generate.max_new_tokens,
            stop_tokens=tuple(task.generate.stop_tokens),
            temperature=task.generate.temperature,
            use_adapter=task.generate.use_adapter,
            step=task.generate.step,
            sample_indices=task.sample_indices,
        )
        groups = generate(self.executor, task.work, options, seed=self._assignment.spec.training.seed)
        return [
            pb.TokenRow(row=sample, tokens=tokens)
            for samples, rows in zip(task.sample_indices, groups, strict=False)
            for sample, tokens in zip(samples, rows, strict=True)
        ]

    def _finish_unit(self, unit: Unit) -> None:
        if self._transport is not None:
            self._transport.finish(unit)

    # ---- commands ----

    def _run_command(self, command: pb.WorkerCommand) -> None:
        match command.WhichOneof("command"):
            case "link":
                self._link(command.link)
            case "take_shadow":
                self._write_shadow()
            case "restore":
                self._restore(dict(command.restore.shadows))
                self._send(pb.WorkerEvent(restored=pb.Restored(step=command.restore.step)), keep_as="restored")
            case "verify_part":
                self._verify(command.verify_part)
            case other:
                raise AssertionError(f"unknown command {other}")

    def _link(self, link: pb.Link) -> None:
        if self._transport is not None and not self._is_linked:
            partners = self.executor.partners
            of_plan = {Peer(p.stage_index, p.replica_index): p for p in link.peers}
            peers = {peer: of_plan[peer].data_address for peer in partners}
            node_ids = {peer: of_plan[peer].agent_id for peer in partners}
            self._transport.connect(peers, node_ids=node_ids)
        self._is_linked = True
        self._send(pb.WorkerEvent(links_up=pb.LinksUp()), keep_as="links_up")

    def _verify(self, request: pb.VerifyPart) -> None:
        data = self._bulk.get_shadow(self._assignment.job_id, request.shadow_id, request.sha256)
        published = load_safetensors(bytes(data))
        difference = part_difference(self.executor.stage, self.executor.method, published)
        verified = pb.PartVerified(request_id=request.request_id, largest_difference=difference)
        self._send(pb.WorkerEvent(part_verified=verified), keep_as="part_verified")

    # ---- callbacks of other threads ----

    def _on_command(self, command: pb.WorkerCommand) -> None:
        match command.WhichOneof("command"):
            case "welcome":
                logger.info("attached to coordinator incarnation %d", command.welcome.incarnation)
            case "feed":
                self._inbox.feed(command.feed)
            case "commit":
                self._inbox.decide(command.commit.step, command.commit)
            case "abort":
                self._inbox.decide(command.abort.step, command.abort)
            case "cancel_unit":
                unit = Unit(UnitKind(command.cancel_unit.unit.kind), command.cancel_unit.unit.serial)
                if self._inbox.cancel(unit) and self._executor is not None:
                    self._executor.cancel(unit)
                if self._transport is not None:
                    # Also where the unit is not being run: a neighbour may have sent tensors of it already.
                    self._transport.cancel(unit)
            case "finish":
                self.end(command.finish.reason)
            case _:
                self._inbox.command(command)

    def _on_peer_lost(self, peer: Peer, reason: str) -> None:
        lost = pb.PeerLost(peer_stage_index=peer.stage_index, peer_replica_index=peer.replica_index, reason=reason)
        self._send(pb.WorkerEvent(peer_lost=lost), keep_as="peer_lost")

    def _on_shadow_stored(self, stored: pb.ShadowStored) -> None:
        self._send(pb.WorkerEvent(shadow_stored=stored), keep_as=f"shadow {stored.step % 8}")

    def _hello(self) -> pb.WorkerHello:
        return pb.WorkerHello(
            worker=worker_to_proto(self._assignment.ref),
            loaded=self._is_loaded,
            linked=self._is_linked,
            next_step=self._next_step,
            units=[unit_to_proto(unit) for unit in self._inbox.units],
        )

    def _send(self, event: pb.WorkerEvent, *, keep_as: str | None = None) -> None:
        self._control.send(event, keep_as=keep_as)

    # ---- bounds ----

    def _max_rows(self) -> int:
        spec = self._assignment.spec
        scoring = spec.scoring
        return max(
            spec.training.batch_size * spec.objective.sequences_per_row, 0 if scoring is None else scoring.batch_rows
        )

    def _max_tokens(self) -> int:
        scoring = self._assignment.spec.scoring
        return self._assignment.spec.data.max_tokens + (0 if scoring is None else scoring.max_new_tokens)

    def _reads_rows(self, kind: UnitKind, micro_batch: int) -> bool:
        """Whether this worker needs a micro-batch's rows; for generation they carry the options."""
        assignment = self._assignment
        if kind == UnitKind.GENERATE:
            return self._me.replica_index == 0
        is_mine = assignment.shape.replica_of(micro_batch) == self._me.replica_index
        return is_mine and (assignment.is_first or assignment.is_last)

    def _decode_rows(self, feed: pb.Feed) -> MicroBatchRows:
        return micro_batch_from_proto(
            feed.rows,
            max_rows=self._max_rows(),
            max_tokens=self._max_tokens(),
            vocab_size=self._vocab_size or 2**31 - 1,
            sample_indices=feed.generate.sample_indices,
        )

    def _check_memory(self) -> None:
        used_bytes = self._device.held_bytes()
        budget_bytes = self._assignment.memory_budget_bytes
        if used_bytes > budget_bytes:
            raise OutOfMemoryError(
                f"stage {self._assignment.stage_index} uses {used_bytes / 2**20:.0f} MiB, its budget is "
                f"{budget_bytes / 2**20:.0f} MiB; give the device more (--memory), or lower micro_batch_size"
            )


def as_plutino_error(error: Exception, assignment: WorkerAssignment) -> Exception:
    """Name what torch only describes: it reports a failed allocation as a RuntimeError."""
    is_allocation = isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and ("not enough memory" in str(error).lower() or isinstance(error, torch.cuda.OutOfMemoryError))
    )
    if not is_allocation:
        return error
    return OutOfMemoryError(
        f"stage {assignment.stage_index} could not allocate memory inside its budget of "
        f"{assignment.memory_budget_bytes / 2**20:.0f} MiB ({error}); give the device more (--memory), or lower "
        "micro_batch_size"
    )
