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

from edge_node.activation_cache.stage_cache import CacheKeys, StageCache
from edge_node.engine.cached_micro_batches import CachedMicroBatch, agree_on_cached
from edge_node.engine.entry_owners import EntryOwners
from edge_node.engine.freezing import freeze_below, stage_of_block
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
from edge_node.engine.stage_input import TARGET_LENGTHS, first_stage_input, later_stage_input
from edge_node.engine.step_gradients import StepGradients, squared_norms
from edge_node.engine.unit import InFlight, StepOutcome, StepTimes, UnitInput, back_propagate, not_finite
from edge_node.methods.base import AttachedMethod, Derives
from edge_node.methods.dropout import dropout_position
from edge_node.methods.gradient_pruning import MOST_MICRO_BATCHES
from edge_node.methods.reward_adapter import RewardAdapter, RewardScores
from edge_node.objectives.base import Objective
from edge_node.stage.gradient_start import GradientStart
from edge_node.stage.passes import StageInput, StageOutput
from edge_node.stage.stage import Stage
from edge_node.transport.base import MessageKey, MessageKind, Peer, Transport, UnitCancelledError
from plutino.job.assignment import StageShape
from plutino.job.method_part import Unfreezing
from plutino.types import SumDtype, Unit

# Shape suffixes: B rows of a micro-batch, T tokens, D hidden size.

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
        self._step_gradients = StepGradients(method.parameters, self.stages, me, replicas_fold=replicas_fold, sums=sums)
        self._gradients: dict[str, Tensor] = {}
        self._cancelled: Unit | None = None
        self._activation_cache = activation_cache
        self._entry_owners = EntryOwners(entry_owners)
        self._cached: dict[int, CachedMicroBatch] = {}
        self._references: dict[int, Tensor] = {}
        self._row_values: dict[int, Tensor] = {}
        self._counts: dict[str, float] = {}
        self.reward_adapter: RewardAdapter | None = None
        """Scores rows beside the job's own adapter; None: the job needs none."""
        self._scorer: Objective = objective

    def use(self, transport: Transport) -> None:
        """Talk to peers over this transport, whose bounds may depend on what this worker shares with them."""
        self._transport = transport

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
        if self._objective.runs_reference:
            self._run_reference(work, times)
        if work.unit.serial == 0 and self.stage.gradient_start is not None:
            self._start_from_gradients(work, self.stage.gradient_start, times)
        self._counts = {}
        actions = train_actions(
            self.stages,
            me=self.me,
            num_micro_batches=work.num_micro_batches,
            first_trainable_stage=self._lowest_stage,
        )
        if self._activation_cache is not None:
            self._cached = agree_on_cached(self, work, self._activation_cache)
        try:
            loss_sum = self._run(work, actions, times, is_training=True, recorder=recorder)
            if self._activation_cache is not None:
                self._entry_owners.hand_over(self, work, self._activation_cache, self._cached)
        finally:
            self._cached = {}
        summed_s = time.perf_counter()
        self._gradients = self._step_gradients.whole(
            self._trained,
            num_micro_batches=work.num_micro_batches,
            unit=work.unit,
            transport=self._transport,
            device=self.stage.device,
        )
        times.wait_s += time.perf_counter() - summed_s
        if recorder is not None and self._step_gradients.groups:
            recorder.end("sum", -1, summed_s)
        norms = squared_norms(self._gradients, [p.name for p in self.method.parameters])
        names = [p.name for p in self.method.parameters]
        reason = not_finite(names, norms, loss_sum, work.unit.serial)
        times.total_s = time.perf_counter() - started_s
        return StepOutcome(norms, not reason, loss_sum, reason, times, recorder, self._counts)

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
        self._row_values = {}
        if self._objective.compares_measured_rows:
            self._run_reference(work, StepTimes())
        actions = forward_actions(self.stages, me=self.me, num_micro_batches=work.num_micro_batches)
        self.method.set_enabled(not (work.without_adapter or work.by_reward_adapter))
        self._score_rewards(work.by_reward_adapter)
        try:
            with torch.no_grad():
                loss_sum = self._run(work, actions, StepTimes(), is_training=False)
        finally:
            self._score_rewards(False)
            self.method.set_enabled(True)
        values, self._row_values = self._row_values, {}
        return loss_sum, values

    def _score_rewards(self, is_on: bool) -> None:
        """Let the reward adapter score rows in place of the objective, or end that."""
        if self.reward_adapter is not None:
            self.reward_adapter.set_enabled(is_on)
        self._scorer = RewardScores() if is_on else self._objective

    def _run_reference(self, work: UnitInput, times: StepTimes) -> None:
        """Let the last stage know what the base model says of every row."""
        self._references = {}
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
        references = dict(self._references)
        self.method.set_enabled(False)
        try:
            with start.watching():
                self._run(work, actions, times, is_training=True)
        finally:
            self.method.set_enabled(True)
            self._references = references
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
        clock = PassClock(self.stage.device)
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
                    with self._position(work, m, is_training=is_training):
                        to_send[m] = back_propagate(in_flight.pop(m), received.pop(m, None))
                    self._step_gradients.take(m)
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
            inputs, metadata = first_stage_input(self.stage, rows, self.method.num_prompt_tokens)
            inputs = inputs.on(self.stage.device)
        else:
            metadata = received
            # Leaves of the graph lie where it is computed: their gradients do not come back to the host here.
            inputs = later_stage_input(metadata).on(self.stage.device)
            if torch.is_grad_enabled():
                for tensor in inputs.trained.values():
                    tensor.requires_grad_(self.me.stage_index > self._lowest_stage)
        output = self._run_stage(m, inputs, metadata)
        trained_in = inputs.trained
        if not self.stage.is_last:
            return InFlight(trained_in, output.trained, output.tensors | metadata), 0.0
        assert rows is not None, "the last stage reads labels"
        # Labels are counted over the rows' own tokens.
        own_BTD = output.hidden[:, self.method.num_prompt_tokens :]
        if is_reference:
            self._references[m] = self._objective.reference(self.stage, own_BTD, rows)
            return InFlight({}, {}, {}), 0.0
        loss = self._scorer.loss(self.stage, own_BTD, rows, work.loss_weight, self._references.pop(m, None))
        for name, count in loss.counts.items():
            self._counts[name] = self._counts.get(name, 0.0) + count
        if loss.values_BK is not None and not torch.is_grad_enabled():
            self._row_values[m] = loss.values_BK.cpu()
        return InFlight(trained_in, {} if loss.scaled is None else {"loss": loss.scaled}, {}), loss.sum

    def _run_stage(self, m: int, inputs: StageInput, metadata: dict[str, Tensor]) -> StageOutput:
        """Run the whole stage, or leave out frozen blocks where the activation cache knows what they give."""
        cached = self._cached.get(m)
        if cached is None or self._activation_cache is None:
            return self.stage.run(inputs)
        targets_B = metadata.get(TARGET_LENGTHS)
        keys = CacheKeys(cached.keys, metadata["lengths"], inputs.position_ids.shape[1], targets_B)
        if not cached.runs_blocks:
            return self.stage.run_known(inputs, self._activation_cache.read(keys, are_checked=self.stage.has_backbone))
        output = self.stage.run(inputs)
        if output.states is not None:
            self._activation_cache.write(keys, output.states)
        return output
