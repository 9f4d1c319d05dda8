"""Seconds: of a stage, of a link, and of one optimiser step of a 1F1B pipeline with unequal stages.

PAC (arXiv:2408.10746 eq. 4) takes the last stage as the bottleneck and adds three phases, which holds for balanced
stages only. Here a step is replayed: every stage runs its actions in the order of 1F1B (Narayanan et al. 2021,
arXiv:2104.04473 sec. 2.2) as soon as their inputs have come, every link carries one message at a time in each
direction, and sends run beside the computation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from partitioner.activations import boundary_bytes
from partitioner.device import DeviceProfile, LinkProfile
from partitioner.memory import micro_batches_in_flight
from partitioner.model import JobShape, ModelTable


@dataclass(frozen=True, slots=True)
class StageCost:
    """Seconds of one micro-batch on one stage and on the link to the next one."""

    forward_s: float
    backward_s: float
    """Recomputation included; 0 where nothing at or below this stage is trained."""
    link_busy_s: float = 0.0
    """How long one message to the next stage occupies the link; 0 on the last stage."""
    link_latency_s: float = 0.0
    has_backward: bool = True
    gets_gradient: bool = True
    """The next stage sends a gradient back to this one."""

    @property
    def compute_s(self) -> float:
        """Forward and backward of one micro-batch."""
        return self.forward_s + self.backward_s

    @property
    def link_s(self) -> float:
        """One message to the next stage, and the gradient that comes back."""
        return (2 if self.gets_gradient else 1) * (self.link_busy_s + self.link_latency_s)

    @property
    def round_trip_s(self) -> float:
        """One micro-batch through the stage and over its link, there and back."""
        return self.compute_s + self.link_s


@dataclass(frozen=True, slots=True)
class StepTime:
    """The replay of one optimiser step."""

    step_s: float
    busy_s: tuple[float, ...]
    """Seconds of computation of each stage."""

    @property
    def bubble_share(self) -> float:
        """Idle share of the busiest stage; every other stage idles more."""
        return max(0.0, 1.0 - max(self.busy_s) / self.step_s) if self.step_s > 0 else 0.0


def stage_cost(
    table: ModelTable,
    shape: JobShape,
    device: DeviceProfile,
    *,
    start_block: int,
    end_block: int,
    checkpointing: bool,
    link: LinkProfile | None,
) -> StageCost:
    """Seconds of blocks ``[start_block, end_block)`` on a device.

    Checkpointing adds one forward pass of every block to its backward pass. Blocks below the first trainable one have
    no backward pass, and a stage of only such blocks gets no gradient.

    Args:
        table: the model.
        shape: the job; its micro-batch is the one that the device's timings are of.
        device: the device.
        start_block: first block; 0 has the embedding with it.
        end_block: one past the last block; the model's last block has final norm, head and loss with it.
        checkpointing: blocks are recomputed in the backward pass.
        link: the link to the next stage; None on the last stage.
    """
    timings = device.timings
    num_trained = end_block - max(start_block, min(shape.first_trainable_block, end_block))
    has_head_backward = end_block == table.num_blocks and (num_trained > 0 or shape.last_trainable_params > 0)
    forward_s = (end_block - start_block) * timings.forward_s
    backward_s = num_trained * (timings.backward_s + (timings.forward_s if checkpointing else 0.0))
    if start_block == 0:
        forward_s += timings.embedding_s
    if end_block == table.num_blocks:
        forward_s += timings.head_forward_s
        backward_s += timings.head_backward_s if has_head_backward else 0.0
    return StageCost(
        forward_s=forward_s,
        backward_s=backward_s,
        link_busy_s=0.0 if link is None else message_bytes(table, shape) / link.bandwidth_bytes_per_s,
        link_latency_s=0.0 if link is None else link.latency_s,
        has_backward=num_trained > 0 or has_head_backward,
        gets_gradient=link is not None and num_trained > 0,
    )


def message_bytes(table: ModelTable, shape: JobShape) -> int:
    """Bytes of the hidden states (or of their gradient) of one micro-batch on the wire."""
    compute_bytes = boundary_bytes(table, shape)
    return compute_bytes if shape.codec == "raw" else compute_bytes * min(2, shape.dtype_bytes) // shape.dtype_bytes


def pipeline_step_time(stages: Sequence[StageCost], num_micro_batches: int) -> StepTime:
    """Replay one step of 1F1B: exact for these seconds, in time proportional to stages x micro-batches.

    Left out, because no profile measures it: the optimiser's update, the vote and the bound of two queued messages.
    """
    num_stages, last = len(stages), len(stages) - 1
    orders = [_order(stage, num_stages, index, num_micro_batches) for index, stage in enumerate(stages)]
    # When the input of micro-batch m's forward (backward) pass is there; None while nobody knows.
    forward_at: list[list[float | None]] = [[None] * num_micro_batches for _ in stages]
    backward_at: list[list[float | None]] = [[None] * num_micro_batches for _ in stages]
    forward_at[0] = [0.0] * num_micro_batches
    free_at = [0.0] * num_stages
    down_free_at, up_free_at = [0.0] * num_stages, [0.0] * num_stages
    done = [0] * num_stages
    remaining = sum(map(len, orders))
    while remaining:
        before = remaining
        for index, stage in enumerate(stages):
            order = orders[index]
            while done[index] < len(order):
                is_forward, m = order[done[index]]
                at = forward_at[index][m] if is_forward else backward_at[index][m]
                if at is None:
                    break
                end_s = max(free_at[index], at) + (stage.forward_s if is_forward else stage.backward_s)
                free_at[index] = end_s
                done[index] += 1
                remaining -= 1
                if is_forward and index < last:
                    sent_s = max(end_s, down_free_at[index]) + stage.link_busy_s
                    down_free_at[index] = sent_s
                    forward_at[index + 1][m] = sent_s + stage.link_latency_s
                elif is_forward:
                    backward_at[index][m] = end_s
                elif index > 0 and stages[index - 1].gets_gradient:
                    above = stages[index - 1]
                    sent_s = max(end_s, up_free_at[index]) + above.link_busy_s
                    up_free_at[index] = sent_s
                    backward_at[index - 1][m] = sent_s + above.link_latency_s
        assert remaining < before, "1F1B never waits in a circle"
    return StepTime(step_s=max(free_at), busy_s=tuple(_busy_s(stage, num_micro_batches) for stage in stages))


@dataclass(frozen=True, slots=True)
class BoundTerms:
    """What one stage adds to a lower bound of the step, independent of the stages behind it."""

    busy_s: float
    """The stage's own computation of the whole step."""
    round_trip_s: float
    """One micro-batch through the stage and its link, there and back."""
    comes_back: bool
    """A gradient comes back for every micro-batch."""


def bound_terms(stage: StageCost, num_micro_batches: int, *, is_last: bool) -> BoundTerms:
    """Terms of a stage, wherever in the pipeline it stands."""
    return BoundTerms(
        busy_s=_busy_s(stage, num_micro_batches),
        round_trip_s=stage.round_trip_s,
        comes_back=stage.has_backward and (is_last or stage.gets_gradient),
    )


def num_turns(num_micro_batches: int, num_behind: int) -> int:
    """Whole round trips that a stage with ``num_behind`` stages behind it makes one after the other in a step.

    It holds only so many micro-batches at once, so the next ones wait until the first have come back.
    """
    return -(-num_micro_batches // micro_batches_in_flight(num_behind + 1, 0, num_micro_batches))


def step_lower_bound(terms: BoundTerms, rest_bound_s: float, rest_round_trip_s: float, turns: int) -> float:
    """Seconds that no step can beat: those of a stage in front of others whose bound is known.

    A step lasts at least as long as the stage computes; as one micro-batch's way through it plus all that the stages
    behind need; and as its round trips in a row.

    Args:
        terms: the stage in front.
        rest_bound_s: bound of the stages behind it; 0 if there are none.
        rest_round_trip_s: least seconds of one micro-batch through them, there and back; 0 if there are none.
        turns: round trips in a row, see :func:`num_turns`.
    """
    turns_s = turns * (terms.round_trip_s + rest_round_trip_s) if terms.comes_back else 0.0
    return max(terms.busy_s, terms.round_trip_s + rest_bound_s, turns_s)


def _busy_s(stage: StageCost, num_micro_batches: int) -> float:
    return num_micro_batches * stage.compute_s


def _order(stage: StageCost, num_stages: int, index: int, num_micro_batches: int) -> list[tuple[bool, int]]:
    """(is forward, micro-batch) in the order of 1F1B; only forward passes where nothing is trained."""
    if not stage.has_backward:
        return [(True, m) for m in range(num_micro_batches)]
    ahead = micro_batches_in_flight(num_stages, index, num_micro_batches) - 1
    order = [(True, m) for m in range(ahead)]
    for m in range(num_micro_batches - ahead):
        order += [(True, m + ahead), (False, m)]
    return order + [(False, m) for m in range(num_micro_batches - ahead, num_micro_batches)]
