"""Forward passes of one stage: from rows or a message to what the next stage gets, or to the loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from edge_node.activation_cache.stage_cache import CacheKeys, StageCache, row_keys
from edge_node.engine.cached_micro_batches import CachedMicroBatch
from edge_node.engine.stage_input import TARGET_LENGTHS, first_stage_input, later_stage_input
from edge_node.engine.unit import InFlight
from edge_node.methods.base import AttachedMethod
from edge_node.methods.reward_adapter import RewardAdapter, RewardScores
from edge_node.objectives.base import Objective
from edge_node.stage.passes import FrozenPass, StageInput, StageOutput
from edge_node.stage.stage import Stage
from plutino.data.batches import MicroBatchRows
from plutino.side_network import BackboneStates

# Shape suffixes: B rows of a micro-batch, T tokens, D hidden size.


@dataclass(frozen=True, slots=True)
class FrozenPart:
    """What of one micro-batch's pass follows from its rows alone, on a worker that holds the whole model."""

    rows: MicroBatchRows
    inputs: StageInput
    metadata: dict[str, Tensor]
    cached: CachedMicroBatch | None
    """What the activation cache has of it; None: there is none."""
    known: BackboneStates | FrozenPass
    """Read from the cache, or computed."""


class ForwardPasses:
    """Runs a stage's forward passes and gathers what the last stage counts in them.

    Args:
        stage: with its method attached.
        method: what is trained.
        objective: what the last stage computes.
        activation_cache: where frozen blocks' states are kept; None: nowhere.
    """

    def __init__(
        self, stage: Stage, method: AttachedMethod, objective: Objective, activation_cache: StageCache | None
    ) -> None:
        self._stage = stage
        self._method = method
        self._objective = self._scorer = objective
        self._activation_cache = activation_cache
        self._cached: Mapping[int, CachedMicroBatch] = {}
        self._ahead: dict[int, FrozenPart] = {}
        self.references: dict[int, Tensor] = {}
        """What the base model says of each micro-batch, until its loss is computed."""
        self.row_values: dict[int, Tensor] = {}
        """What the objective said of the rows of each micro-batch in passes that train nothing."""
        self.counts: dict[str, float] = {}
        """What the objective counted."""

    def begin(self, cached: Mapping[int, CachedMicroBatch], ahead: Mapping[int, FrozenPart]) -> None:
        """Passes from now on are of a unit of which this much is known.

        Args:
            cached: what is cached of its micro-batches; empty: all blocks run, and nothing is kept.
            ahead: micro-batches whose frozen part has run before; each is used once.
        """
        self._cached, self._ahead = cached, dict(ahead)

    def score_by(self, rewards: RewardAdapter | None, *, is_on: bool) -> None:
        """Let the reward adapter score rows in place of the objective, or end that."""
        if rewards is not None:
            rewards.set_enabled(is_on)
        self._scorer = RewardScores() if is_on else self._objective

    def from_rows(
        self, m: int, rows: MicroBatchRows, *, loss_weight: float, is_reference: bool = False
    ) -> tuple[InFlight, float | Tensor]:
        """The first stage's pass: what is in flight then, and the sum of losses where the stage is the last one."""
        part = None if is_reference else self._ahead.pop(m, None)
        if part is None:
            inputs, metadata = first_stage_input(self._stage, rows, self._method.num_prompt_tokens)
            output = self._run(m, inputs.on(self._stage.device), metadata)
        else:
            inputs, metadata = part.inputs, part.metadata
            output = self._go_on(part)
        return self._finish(m, inputs, metadata, output, rows, loss_weight=loss_weight, is_reference=is_reference)

    def from_message(
        self,
        m: int,
        metadata: dict[str, Tensor],
        rows: MicroBatchRows | None,
        *,
        loss_weight: float,
        wants_gradient: bool,
        is_reference: bool = False,
    ) -> tuple[InFlight, float | Tensor]:
        """A later stage's pass; ``wants_gradient`` says whether anything below it is trained."""
        # Leaves of the graph lie where it is computed: their gradients do not come back to the host here.
        inputs = later_stage_input(metadata).on(self._stage.device)
        if torch.is_grad_enabled():
            for tensor in inputs.trained.values():
                tensor.requires_grad_(wants_gradient)
        output = self._run(m, inputs, metadata)
        return self._finish(m, inputs, metadata, output, rows, loss_weight=loss_weight, is_reference=is_reference)

    def frozen_part(self, rows: MicroBatchRows) -> FrozenPart | None:
        """Run, or read, what of a training pass follows from rows alone; the stage is the only one.

        What is run is written where it is kept. None: the blocks have trained parts, and are not known.

        Raises:
            ActivationCacheError: an entry is missing, and there are no blocks to compute it.
        """
        stage, cache = self._stage, self._activation_cache
        inputs, metadata = first_stage_input(stage, rows, self._method.num_prompt_tokens)
        inputs = inputs.on(stage.device)
        cached = None
        if cache is not None:
            keys = row_keys(rows, cache.codec, has_targets=stage.family.halves is not None)
            cached = CachedMicroBatch(keys, stage.has_backbone and not cache.holds(keys))
            if not cached.runs_blocks:
                states = cache.read(_cache_keys(cached, inputs, metadata), are_checked=stage.has_backbone)
                return FrozenPart(rows, inputs, metadata, cached, states)
        if not stage.runs_beside:
            return None
        frozen = stage.run_frozen(inputs)
        if cache is not None and cached is not None:
            cache.write(_cache_keys(cached, inputs, metadata), frozen.states)
        return FrozenPart(rows, inputs, metadata, cached, frozen)

    def _go_on(self, part: FrozenPart) -> StageOutput:
        """The trained part of a pass whose frozen part is known."""
        if isinstance(part.known, FrozenPass):
            return self._stage.run_on(part.inputs, part.known)
        return self._stage.run_known(part.inputs, part.known)

    def _run(self, m: int, inputs: StageInput, metadata: dict[str, Tensor]) -> StageOutput:
        """Run the whole stage, or leave out frozen blocks where the activation cache knows what they give."""
        cached = self._cached.get(m)
        if cached is None or self._activation_cache is None:
            return self._stage.run(inputs)
        keys = _cache_keys(cached, inputs, metadata)
        if not cached.runs_blocks:
            known = self._activation_cache.read(keys, are_checked=self._stage.has_backbone)
            return self._stage.run_known(inputs, known)
        output = self._stage.run(inputs)
        if output.states is not None:
            self._activation_cache.write(keys, output.states)
        return output

    def _finish(
        self,
        m: int,
        inputs: StageInput,
        metadata: dict[str, Tensor],
        output: StageOutput,
        rows: MicroBatchRows | None,
        *,
        loss_weight: float,
        is_reference: bool,
    ) -> tuple[InFlight, float | Tensor]:
        trained_in = inputs.trained
        if not self._stage.is_last:
            return InFlight(trained_in, output.trained, output.tensors | metadata), 0.0
        assert rows is not None, "the last stage reads labels"
        # Labels are counted over the rows' own tokens.
        own_BTD = output.hidden[:, self._method.num_prompt_tokens :]
        if is_reference:
            self.references[m] = self._objective.reference(self._stage, own_BTD, rows)
            return InFlight({}, {}, {}), 0.0
        loss = self._scorer.loss(self._stage, own_BTD, rows, loss_weight, self.references.pop(m, None))
        for name, count in loss.counts.items():
            self.counts[name] = self.counts.get(name, 0.0) + count
        if loss.values_BK is not None and not torch.is_grad_enabled():
            self.row_values[m] = loss.values_BK.cpu()
        return InFlight(trained_in, {} if loss.scaled is None else {"loss": loss.scaled}, {}), loss.sum


def _cache_keys(cached: CachedMicroBatch, inputs: StageInput, metadata: Mapping[str, Tensor]) -> CacheKeys:
    num_tokens = inputs.position_ids.shape[1]
    return CacheKeys(cached.keys, metadata["lengths"], num_tokens, metadata.get(TARGET_LENGTHS))
