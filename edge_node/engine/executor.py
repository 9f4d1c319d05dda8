"""Runs one stage: carries out a schedule's actions, keeps the step's gradients until they are committed.

A training step has two halves. :meth:`StageExecutor.train_step` computes the whole gradient of every parameter the
stage holds and returns what the coordinator votes on. :meth:`StageExecutor.commit` applies it, :meth:`drop` forgets it;
between the two nothing of the step is visible in the parameters.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from edge_node.activation_cache.stage_cache import StageCache
from edge_node.engine.cached_micro_batches import CachedMicroBatch, agree_on_cached
from edge_node.engine.entry_owners import EntryOwners
from edge_node.engine.forward_passes import ForwardPasses
from edge_node.engine.freezing import freeze_below, stage_of_block
from edge_node.engine.frozen_ahead import Following, FrozenAhead
from edge_node.engine.neighbours import partners
from edge_node.engine.optimizer import StageOptimizer
from edge_node.engine.pass_clock import PassClock
from edge_node.engine.recorder import StepRecorder
from edge_node.engine.schedule import (
    Action,
    Backward,
    Forward,
    Receive,
    Send,
    first_gradient_actions,
    forward_actions,
    train_actions,
)
from edge_node.engine.step_gradients import StepGradients, squared_norms
from edge_node.engine.unit import InFlight, StepOutcome, StepTimes, UnitInput, back_propagate, not_finite
from edge_node.methods.base import AttachedMethod, Derives
from edge_node.methods.dropout import dropout_position
from edge_node.methods.gradient_pruning import MOST_MICRO_BATCHES
from edge_node.methods.reward_adapter import RewardAdapter
from edge_node.objectives.base import Objective
from edge_node.processors import processor_quota
from edge_node.stage.gradient_start import GradientStart
from edge_node.stage.stage import Stage
from edge_node.transport.base import MessageKey, MessageKind, Peer, Transport, UnitCancelledError
from plutino.job.assignment import StageShape
from plutino.job.method_part import Unfreezing
from plutino.types import SumDtype, Unit

_DOWNWARD = (MessageKind.FORWARD, MessageKind.REFERENCE, MessageKind.FIRST_FORWARD)
"""What a forward pass gives."""


class StageExecutor:
    """One stage with its adapter, optimiser and peers."""

    def __init__(
        self,
        *,
        stage: Stage,
        method: AttachedMethod,
        objective: Objective,
        optimizer: StageOptimizer,
        transport: Transport | None,
        stages: Sequence[StageShape],
        me: Peer,
        seed: int,
        codec_above: str = "raw",
        codec_below: str = "raw",
        first_trainable_stage: int = 0,
        unfreezing: Unfreezing | None = None,
        replicas_fold: bool = False,
        sums: SumDtype = "fp32",
        activation_cache: StageCache | None = None,
        entry_owners: Sequence[Peer] = (),
    ) -> None:
        self.stage = stage
        self.method = method
        self.me = me
        self.stages = tuple(stages)
        self.seed = seed
        self.codec_above = codec_above
        """Of gradients to the stage before."""
        self.codec_below = codec_below
        """Of hidden states to the next stage."""
        self._objective = objective
        self.optimizer = optimizer
        self._transport = transport
        self._first_trainable_stage = self._lowest_stage = first_trainable_stage
        self._unfreezing = unfreezing
        self._trained = frozenset(p.name for p in method.parameters)
        self._step_gradients = StepGradients(
            method.parameters, self.stages, me, replicas_fold=replicas_fold, sums=sums, device=stage.device
        )
        self._gradients: dict[str, Tensor] = {}
        self._cancelled: Unit | None = None
        self._activation_cache = activation_cache
        self._entry_owners = EntryOwners(entry_owners)
        self._cached: dict[int, CachedMicroBatch] = {}
        self._passes = ForwardPasses(stage, method, objective, activation_cache)
        self._ahead = FrozenAhead(self._passes, self._first_micro_batch) if stage.is_first and stage.is_last else None
        self._following: Following = lambda: None
        self.reward_adapter: RewardAdapter | None = None
        """Scores rows beside the job's own adapter; None: the job needs none."""

    def use(self, transport: Transport) -> None:
        """Talk to peers over this transport, whose bounds may depend on what this worker shares with them."""
        self._transport = transport

    def look_ahead(self, following: Following) -> None:
        """Ask this for the next step whenever there is time to run something of it before its turn."""
        self._following = following

    @property
    def partners(self) -> frozenset[Peer]:
        """The workers with which this one has a stream."""
        return partners(self.stages, self._step_gradients.partners, self.me, self._entry_owners.peers)

    @property
    def largest_gradient_bytes(self) -> int:
        """Bytes of the largest message of shared parameters' gradients, without its header."""
        return self._step_gradients.largest_message_bytes

    @property
    def transport(self) -> Transport:
        """The transport; a job of one stage and one replica has none."""
        assert self._transport is not None, "a single worker has no peer to talk to"
        return self._transport

    def train_step(self, work: UnitInput) -> StepOutcome:
        """Run forward and backward passes of one step and sum its gradients over all holders.

        Raises:
            PeerLostError: a peer went away.
            UnitCancelledError: the coordinator abandoned the step.
        """
        started_s = time.perf_counter()
        times = StepTimes()
        recorder = StepRecorder(self.stage.device) if work.is_recorded else None
        self._gradients = {}
        self._step_gradients.start()
        self._freeze(work.unit.serial)
        ahead = {} if self._ahead is None else self._ahead.take(work)
        if self._objective.runs_reference:
            self._run_reference(work, times)
        if work.unit.serial == 0 and self.stage.gradient_start is not None:
            self._start_from_gradients(work, self.stage.gradient_start, times)
        self._passes.counts = {}
        actions = train_actions(
            self.stages,
            me=self.me,
            num_micro_batches=work.num_micro_batches,
            first_trainable_stage=self._lowest_stage,
        )
        self._step_gradients.expect(
            [action.micro_batch for action in actions if isinstance(action, Backward)],
            num_micro_batches=work.num_micro_batches,
            unit=work.unit,
            transport=self._transport,
        )
        try:
            if self._activation_cache is not None:
                known = {m: part.cached for m, part in ahead.items() if part.cached is not None}
                self._cached = agree_on_cached(self, work, self._activation_cache, known)
            self._passes.begin(self._cached, ahead)
            loss_sum = self._run(work, actions, times, is_training=True, recorder=recorder)
            self._step_gradients.end_passes()
            # Entries that go to another device queue behind the sums' messages: nothing waits for them meanwhile.
            self._run_ahead(times, recorder)
            if self._activation_cache is not None:
                self._entry_owners.hand_over(self, work, self._activation_cache, self._cached)
            summed_s = time.perf_counter()
            self._gradients = self._step_gradients.whole(self._trained)
        except BaseException:
            self._step_gradients.drop()
            raise
        finally:
            self._cached = {}
            self._passes.begin({}, {})
        times.wait_s += time.perf_counter() - summed_s
        if recorder is not None and self._step_gradients.groups:
            recorder.end("sum", -1, summed_s)
        norms = squared_norms(self._gradients, [p.name for p in self.method.parameters])
        names = [p.name for p in self.method.parameters]
        reason = not_finite(names, norms, loss_sum, work.unit.serial)
        times.total_s = time.perf_counter() - started_s
        return StepOutcome(norms, not reason, loss_sum, reason, times, recorder, self._passes.counts)

    def _run_ahead(self, times: StepTimes, recorder: StepRecorder | None) -> None:
        """Run something of the next step, if the sums of this one are still on their way."""
        if self._ahead is None or not self._step_gradients.is_summing or (following := self._following()) is None:
            return
        started_s = time.perf_counter()
        micro_batch = self._ahead.run(following)
        if micro_batch is not None:
            times.compute_s += time.perf_counter() - started_s
            if recorder is not None:
                recorder.end("ahead", micro_batch, started_s)

    def _first_micro_batch(self, num_micro_batches: int) -> int | None:
        mine = (m for m in range(num_micro_batches) if self.stages[0].replica_of(m) == self.me.replica_index)
        return next(mine, None)

    def _freeze(self, step: int) -> None:
        """Leave out what is not unfrozen yet: a function of the step alone, alike on every stage."""
        if self._unfreezing is None:
            return
        lowest_block = self._unfreezing.lowest_block(step, self.stage.num_blocks)
        self._lowest_stage = max(self._first_trainable_stage, stage_of_block(lowest_block, self.stages))
        num_encoder_blocks = self.stage.num_encoder_blocks
        self._trained = freeze_below(self.method.parameters, self.stage.family, lowest_block, num_encoder_blocks)

    def commit(self, step: int, clip_scale: float) -> None:
        """Apply the gradients of the step that was voted on."""
        self.optimizer.apply(step, self._gradients, clip_scale)
        self.drop()

    def drop(self) -> None:
        """Forget the gradients of the step in progress."""
        self._gradients = {}
        self._step_gradients.drop()

    def snapshot(self) -> dict[str, Tensor]:
        """The training state by global name, as shadows hold it, with what the checkpoint has in its place."""
        derived = self.method.derived() if isinstance(self.method, Derives) else {}
        return self.optimizer.snapshot() | {f"derived/{name}": value.cpu() for name, value in derived.items()}

    def evaluate(self, work: UnitInput) -> float:
        """Sum of losses over the unit's micro-batches; 0 on all stages but the last."""
        return self.evaluate_rows(work)[0]

    def evaluate_rows(self, work: UnitInput) -> tuple[float, dict[int, Tensor]]:
        """As :meth:`evaluate`, with what the objective says of the rows of each micro-batch that this worker ran."""
        self._passes.row_values = {}
        if self._objective.compares_measured_rows:
            self._run_reference(work, StepTimes())
        actions = forward_actions(self.stages, me=self.me, num_micro_batches=work.num_micro_batches)
        self.method.set_enabled(not (work.without_adapter or work.by_reward_adapter))
        self._passes.score_by(self.reward_adapter, is_on=work.by_reward_adapter)
        try:
            with torch.no_grad():
                loss_sum = self._run(work, actions, StepTimes(), is_training=False)
        finally:
            self._passes.score_by(self.reward_adapter, is_on=False)
            self.method.set_enabled(True)
        values, self._passes.row_values = self._passes.row_values, {}
        return loss_sum, values

    def _run_reference(self, work: UnitInput, times: StepTimes) -> None:
        """Let the last stage know what the base model says of every row."""
        self._passes.references = {}
        kind = MessageKind.REFERENCE
        actions = forward_actions(self.stages, me=self.me, num_micro_batches=work.num_micro_batches, kind=kind)
        self.method.set_enabled(False)
        try:
            with torch.no_grad():
                self._run(work, actions, times, is_training=False, is_reference=True)
        finally:
            self.method.set_enabled(True)

    def _start_from_gradients(self, work: UnitInput, start: GradientStart, times: StepTimes) -> None:
        """Send gradients of the first rows' own loss through the frozen blocks, and let the method start from them."""
        actions = first_gradient_actions(
            self.stages,
            me=self.me,
            num_micro_batches=min(work.num_micro_batches, MOST_MICRO_BATCHES),
            first_trainable_stage=self._lowest_stage,
        )
        references = dict(self._passes.references)
        self.method.set_enabled(False)
        try:
            with start.watching():
                self._run(work, actions, times, is_training=True)
        finally:
            self.method.set_enabled(True)
            self._passes.references = references
            # What a head that is trained beside it got belongs to no step.
            self._step_gradients.start()
        start.finish()

    def cancel(self, unit: Unit) -> None:
        """Abandon the unit that is being run, from any thread: it ends before its next action.

        The transport's own cancel wakes who waits for a peer; a single worker has no transport.
        """
        self._cancelled = unit

    def check_cancelled(self, unit: Unit) -> None:
        """Look whether a unit was abandoned.

        Raises:
            UnitCancelledError: it was.
        """
        if unit == self._cancelled:
            raise UnitCancelledError(f"{unit} was abandoned")

    def _run(
        self,
        work: UnitInput,
        actions: Sequence[Action],
        times: StepTimes,
        *,
        is_training: bool,
        is_reference: bool = False,
        recorder: StepRecorder | None = None,
    ) -> float:
        runs_backward = is_training and self.me.stage_index >= self._lowest_stage
        in_flight: dict[int, InFlight] = {}
        received: dict[int, dict[str, Tensor]] = {}
        to_send: dict[int, dict[str, Tensor]] = {}
        losses: list[float | Tensor] = []
        # Asked every time, because whoever set it may change it: 0.1 ms.
        clock = PassClock(self.stage.device, None if self.stage.device.type == "cuda" else processor_quota())
        for action in actions:
            self.check_cancelled(work.unit)
            started_s = time.perf_counter()
            match action:
                case Receive(m, kind, peer):
                    received[m] = self.transport.receive(peer, MessageKey(kind, work.unit, m))
                    times.wait_s += time.perf_counter() - started_s
                case Forward(m):
                    clock.start()
                    with self._position(work, m, is_training=is_training):
                        in_flight[m], loss = self._forward(work, m, received.pop(m, None), is_reference=is_reference)
                    clock.end()
                    losses.append(loss)
                    if self.stage.is_last and not runs_backward:
                        del in_flight[m]
                case Send(m, kind, peer) if kind in _DOWNWARD:
                    flight = in_flight[m] if runs_backward else in_flight.pop(m)
                    self.transport.send(peer, MessageKey(kind, work.unit, m), flight.message, codec=self.codec_below)
                    times.send_s += time.perf_counter() - started_s
                case Backward(m):
                    clock.start()
                    self._step_gradients.begin_pass(m)
                    with self._position(work, m, is_training=is_training):
                        to_send[m] = back_propagate(in_flight.pop(m), received.pop(m, None))
                    self._step_gradients.end_pass(m)
                    clock.end()
                case Send(m, kind, peer):
                    self.transport.send(peer, MessageKey(kind, work.unit, m), to_send.pop(m), codec=self.codec_above)
                    times.send_s += time.perf_counter() - started_s
                case _:
                    raise AssertionError(f"unknown action {action}")
            if recorder is not None:
                recorder.end_action(action, started_s)
        times.compute_s += clock.seconds()
        # One after the other in the order of micro-batches: losses must not depend on when they are read.
        return sum(map(float, losses), 0.0)

    def _position(self, work: UnitInput, m: int, *, is_training: bool) -> AbstractContextManager[None]:
        if not is_training:
            return nullcontext()
        return dropout_position(seed=self.seed, step=work.unit.serial, micro_batch=m)

    def _forward(
        self, work: UnitInput, m: int, received: dict[str, Tensor] | None, *, is_reference: bool
    ) -> tuple[InFlight, float | Tensor]:
        rows = work.rows[m]
        if received is None:
            assert rows is not None, "the first stage reads tokens"
            return self._passes.from_rows(m, rows, loss_weight=work.loss_weight, is_reference=is_reference)
        return self._passes.from_message(
            m,
            received,
            rows,
            loss_weight=work.loss_weight,
            wants_gradient=self.me.stage_index > self._lowest_stage,
            is_reference=is_reference,
        )
