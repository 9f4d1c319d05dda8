"""One worker's life with one job: load the stage, link up, run units as they come, vote, commit, shadow, end.

The compute thread runs :meth:`WorkerSession.run`. Commands come on the control stream's thread into the inbox; shadows
are uploaded on a thread of their own.
"""

from __future__ import annotations

import logging
import time

from safetensors.torch import load as load_safetensors

from edge_node.activation_cache.stage_cache import StageCache
from edge_node.compute_device import CPU, ComputeDevice
from edge_node.control import ControlStream
from edge_node.engine.executor import StageExecutor
from edge_node.failed_allocation import as_plutino_error
from edge_node.going_on import KeptState
from edge_node.inbox import CommandTask, Inbox, UnitTask
from edge_node.loading import (
    LoadingClock,
    StageLoading,
    make_executor,
    open_activations,
    open_reward_adapter,
    open_transport,
)
from edge_node.methods.score_head import attach_method
from edge_node.network import DeviceNetwork
from edge_node.shadowing import ShadowWriter
from edge_node.stage.resident import ResidentStage
from edge_node.state_exchange import StateHandover
from edge_node.transport.base import Peer, UnitCancelledError
from edge_node.transport.peer import PeerTransport
from edge_node.unit_bounds import UnitBounds
from edge_node.weights_config import WeightsConfig
from edge_node.worker_reports import (
    generated_rows,
    part_verified,
    stage_loaded,
    step_trace,
    step_vote,
)
from plutino.errors import PeerLostError
from plutino.job.assignment import RestorePoint, WorkerAssignment
from plutino.types import Unit, UnitKind
from plutino.wire.bulk import BulkClient
from plutino.wire.convert import row_values_to_proto, unit_to_proto, worker_to_proto
from protos import workers_pb2 as pb

logger = logging.getLogger(__name__)


class WorkerSession:
    """Runs one stage of one job until the coordinator says that it is over."""

    def __init__(
        self,
        assignment: WorkerAssignment,
        network: DeviceNetwork | None = None,
        weights: WeightsConfig | None = None,
        device: ComputeDevice = CPU,
        resident: ResidentStage | None = None,
        kept: KeptState | None = None,
    ) -> None:
        """``resident`` is a stage that an earlier job left here; one of another key is not used.

        ``kept`` is what this process trained under the job's plan before.
        """
        self._assignment = assignment
        self._held = resident if resident is not None and resident.key == assignment.stage_key else None
        self._resident: ResidentStage | None = None
        self._device = device
        self._network = network or DeviceNetwork()
        self._credentials = self._network.credentials()
        self._weights_config = weights or WeightsConfig()
        self.goes_on = False
        """The process has a part in the job's next plan."""
        self._end_reason: str | None = None
        self._me = Peer(assignment.stage_index, assignment.replica_index)
        self._next_step = assignment.restore.step if assignment.restore else 0
        self._is_loaded = False
        self._is_linked = False
        self._commit_s = 0.0
        self._encode_s = 0.0
        self._finish_reason = "the coordinator did not come back"
        self._bounds = UnitBounds(assignment, self._me)
        self._inbox = Inbox(reads_rows=self._bounds.reads_rows, decode_rows=self._bounds.decode_rows)
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
        self._loading = StageLoading(
            assignment,
            self._weights_config,
            device,
            self._bulk,
            credentials=self._credentials,
            tell=self._tell_progress,
        )
        self._state = StateHandover(assignment, self._bulk, self._credentials, self._weights_config.cache(), kept)
        self._shadows = ShadowWriter(assignment.ref, self._bulk, on_stored=self._on_shadow_stored)
        self._executor: StageExecutor | None = None
        self._activations: StageCache | None = None

    def end(self, reason: str) -> None:
        """End as if the coordinator had said so; from any thread."""
        self._finish_reason = self._end_reason = reason
        self._inbox.finish(reason)
        self._loading.stop(reason)
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
            failure = as_plutino_error(error, self._assignment, self._device)
            self._send(pb.WorkerEvent(failed=pb.WorkerFailed(error=type(failure).__name__, reason=str(failure))))
            raise failure from error
        finally:
            self._loading.close()
            if self._activations is not None:
                self._activations.close()
            self._shadows.close()
            self._bulk.close()
            self._control.close()
            if self._transport is not None:
                self._transport.close()
            self._state.close()

    def take_stage(self) -> ResidentStage | None:
        """After :meth:`run`: the stage as it was loaded, if the job asks to keep it and nothing changed its weights."""
        resident, self._resident, self._executor = self._resident, None, None
        if resident is None or not self._assignment.keeps_stage_s or not resident.restore():
            return None
        return resident

    def take_state(self) -> KeptState | None:
        """After :meth:`run`, instead of :meth:`take_stage`: what was trained, if the process goes on with the job."""
        executor, self._executor, self._resident = self._executor, None, None
        if not self.goes_on or executor is None or not self._is_loaded:
            return None
        return self._state.leave(executor.snapshot())

    # ---- loading ----

    def _load(self) -> None:
        clock = LoadingClock()
        assignment = self._assignment
        spec = assignment.spec
        held, self._held = self._held, None
        stage = self._loading.build() if held is None else held.stage
        clock.end("weights")
        self._resident = held or ResidentStage(stage, assignment.stage_key)
        self._bounds.vocab_size = int(stage.config.vocab_size)
        is_restored = assignment.restore is not None
        own = spec.model_copy(update={"method": spec.method.when_restored()}) if is_restored else spec
        method = attach_method(stage, own)
        if (initial := assignment.initial) is not None:
            stored = self._bulk.get_shadow(assignment.job_id, initial.shadow_id, initial.sha256)
            method.load(load_safetensors(bytes(stored)))
        clock.end("adapter")
        self._activations = open_activations(assignment, self._weights_config, self._device, stage)
        self._executor = make_executor(assignment, stage, method, self._me, self._activations)
        self._executor.look_ahead(self._inbox.following_step)
        self._executor.reward_adapter = open_reward_adapter(assignment, stage, self._bulk)
        self._transport = open_transport(
            assignment,
            self._network,
            bounds=self._bounds.of_messages(stage.boundary_width, self._executor.largest_gradient_bytes),
            is_for_card=self._device.is_cuda,
            on_peer_lost=self._on_peer_lost,
        )
        if self._transport is not None:
            self._executor.use(self._transport)
        clock.end("cache")
        if assignment.restore is not None:
            self._restore(assignment.restore)
            self._state.let_go()
            # Where malloc keeps its heap, the files that the state came in would count until the job ends.
            self._device.release()
        clock.end("state")
        self._check_memory()
        self._is_loaded = True
        loaded = stage_loaded(
            stage,
            method,
            clock,
            is_resident=held is not None,
            went_on=self._state.went_on,
            state_by_place=self._state.bytes_by_place,
            rss_bytes=self._device.held_bytes(),
            data_address="" if self._transport is None else self._transport.address,
            bytes_by_place=self._loading.bytes_by_place(stage),
        )
        self._send(pb.WorkerEvent(loaded=loaded), keep_as="loaded")

    def _restore(self, point: RestorePoint) -> None:
        names = [parameter.name for parameter in self.executor.method.parameters]
        self.executor.optimizer.restore(self._state.read(point, names))

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
                done.rows.extend(generated_rows(self.executor, task, seed=self._assignment.spec.training.seed))
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
        vote = step_vote(
            self._assignment.plan_epoch,
            step,
            outcome,
            device=self._device,
            transport=self._transport,
            activations=self._activations,
            encode_s=self._take_encode_s(),
            commit_s=self._commit_s,
        )
        self._send(pb.WorkerEvent(step_ready=vote), keep_as="step_ready")
        decision = self._inbox.wait_decision(step)
        decided_s = time.perf_counter()
        self._commit_s = decided_s - voted_s
        if outcome.recorder is not None:
            outcome.recorder.end("wait", -1, voted_s)
        if decision is None:
            return
        if isinstance(decision, pb.Commit):
            self.executor.commit(step, decision.clip_scale)
        else:
            self.executor.drop()
        if outcome.recorder is not None:
            outcome.recorder.end("update", -1, decided_s)
            self._send(pb.WorkerEvent(step_trace=step_trace(step, outcome.recorder)))
        self._next_step = step + 1
        self._inbox.start_at(self._next_step)
        self._control.forget("step_ready")
        self._finish_unit(task.work.unit)
        if isinstance(decision, pb.Commit) and decision.shadow:
            self._write_shadow()

    def _take_encode_s(self) -> float:
        """Seconds of encoding since the last vote."""
        before_s, self._encode_s = self._encode_s, 0.0 if self._transport is None else self._transport.usage.encode_s
        return self._encode_s - before_s

    def _write_shadow(self) -> None:
        # All replicas of a stage hold the same state to the bit: one copy is enough for all of them.
        if self._me.replica_index == 0:
            self._shadows.write(self._next_step, self.executor.snapshot())

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
                self._restore(RestorePoint(step=command.restore.step, shadows=dict(command.restore.shadows)))
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
        verified = part_verified(self.executor, request.request_id, load_safetensors(bytes(data)))
        self._send(pb.WorkerEvent(part_verified=verified), keep_as="part_verified")

    # ---- callbacks of other threads ----

    def _tell_progress(self, progress: pb.LoadProgress) -> None:
        if not self._is_loaded:
            self._send(pb.WorkerEvent(load_progress=progress))

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
                # A later word that the plan is over takes nothing back.
                self.goes_on |= command.finish.goes_on
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

    def _check_memory(self) -> None:
        self._device.check(self._assignment.memory_budget_bytes, f"stage {self._assignment.stage_index}")
