"""Seconds of one optimiser step of a 1F1B pipeline with unequal stages and replicas.

PAC (arXiv:2408.10746 eq. 4) takes the last stage as the bottleneck and adds three phases, which holds for balanced
stages only. Here a step is replayed: every worker runs its actions in the order of 1F1B (Narayanan et al. 2021,
arXiv:2104.04473 sec. 2.2) as soon as their inputs have come, every link carries one message at a time in each
direction, and sends run beside the computation.

The replay is one code for numbers and for arrays of them: :func:`replay_many` times many cuts of a layout at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from partitioner.cost import StageCost

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class StageGroup:
    """One stage on its replicas."""

    replicas: tuple[StageCost, ...]
    owners: tuple[int, ...] = ()
    """Replica that runs micro-batch m; empty: replica 0 runs all."""
    links: tuple[tuple[tuple[float, float], ...], ...] = ()
    """[replica][replica of the next stage] -> (seconds a message occupies the link, its latency)."""
    sum_s: float = 0.0
    """Seconds from the last backward pass until all replicas have the whole gradient."""
    ahead: int = 0
    """See :func:`partitioner.layout.ahead_of`."""


@dataclass(frozen=True, slots=True)
class StepTime:
    """The replay of one optimiser step."""

    step_s: float
    busy_s: tuple[float, ...]
    """Seconds of computation of each stage's busiest replica."""
    link_busy_s: tuple[float, ...] = field(default=())
    """Seconds that the busiest link of each boundary carries messages, in one direction."""

    @property
    def bubble_share(self) -> float:
        """Idle share of the busiest stage; every other stage idles more."""
        return max(0.0, 1.0 - max(self.busy_s) / self.step_s) if self.step_s > 0 else 0.0


def pipeline_step_time(stages: Sequence[StageCost], num_micro_batches: int) -> StepTime:
    """Replay one step of stages with one worker each: exact for these seconds.

    Left out, because no profile measures it: the optimiser's update, the vote and the bound of two queued messages.
    """
    return replay(
        [StageGroup((stage,), (), (((stage.link_busy_s, stage.link_latency_s),),)) for stage in stages],
        num_micro_batches,
    )


def replay(groups: Sequence[StageGroup], num_micro_batches: int) -> StepTime:
    """Replay one step, in time proportional to stages x micro-batches."""
    step_s = _run(groups, num_micro_batches, later=max)
    busy_s, link_busy_s = [], []
    for k, group in enumerate(groups):
        counts = _counts(group, num_micro_batches)
        busy_s.append(max(n * cost.compute_s for n, cost in zip(counts, group.replicas, strict=True)))
        if k + 1 < len(groups):
            link_busy_s.append(_link_busy_s(group, groups[k + 1], num_micro_batches))
    return StepTime(step_s=step_s, busy_s=tuple(busy_s), link_busy_s=tuple(link_busy_s))


def replay_many(
    groups: Sequence[StageGroup],
    forward_s: Sequence[Floats],
    backward_s: Sequence[Floats],
    sum_s: Floats,
    num_micro_batches: int,
) -> Floats:
    """Seconds of a step for many cuts of one layout, shape (N,).

    Args:
        groups: one of them; owners, links and who has a backward pass must be those of all.
        forward_s: for every stage, (N, replicas).
        backward_s: likewise.
        sum_s: (N, stages).
        num_micro_batches: of the step.
    """
    as_arrays: list[Any] = [
        replace(
            group,
            replicas=tuple(
                replace(cost, forward_s=forward_s[k][:, r], backward_s=backward_s[k][:, r])  # type: ignore[arg-type]
                for r, cost in enumerate(group.replicas)
            ),
            sum_s=sum_s[:, k],  # type: ignore[arg-type]
        )
        for k, group in enumerate(groups)
    ]
    found: Floats = _run(as_arrays, num_micro_batches, later=np.maximum)
    return found


@lru_cache(maxsize=512)
def evaluation_order(
    windows: tuple[int, ...], num_micro_batches: int, has_backward: tuple[bool, ...]
) -> tuple[tuple[int, bool, int], ...]:
    """(stage, is forward, micro-batch) of a step in an order in which every input is known before it is needed.

    Restricted to one worker it is the order in which that worker runs its actions: forward passes up to the window,
    then one backward pass for each forward; only forward passes where nothing is trained.
    """
    orders = [_stage_order(w, num_micro_batches, back) for w, back in zip(windows, has_backward, strict=True)]
    last = len(windows) - 1
    num_forward, num_backward = [0] * len(windows), [0] * len(windows)
    position = [0] * len(windows)
    found: list[tuple[int, bool, int]] = []
    remaining = sum(map(len, orders))
    while remaining:
        before = remaining
        for k, order in enumerate(orders):
            while position[k] < len(order):
                is_forward, m = order[position[k]]
                if is_forward and k > 0 and num_forward[k - 1] <= m:
                    break
                if not is_forward and k < last and num_backward[k + 1] <= m:
                    break
                found.append((k, is_forward, m))
                counter = num_forward if is_forward else num_backward
                counter[k] = m + 1
                position[k] += 1
                remaining -= 1
        assert remaining < before, "1F1B never waits in a circle"
    return tuple(found)


def _stage_order(window: int, num_micro_batches: int, has_backward: bool) -> list[tuple[bool, int]]:
    if not has_backward:
        return [(True, m) for m in range(num_micro_batches)]
    ahead = min(window, num_micro_batches) - 1
    order = [(True, m) for m in range(ahead)]
    for m in range(num_micro_batches - ahead):
        order += [(True, m + ahead), (False, m)]
    return order + [(False, m) for m in range(num_micro_batches - ahead, num_micro_batches)]


def _run(groups: Sequence[Any], num_micro_batches: int, later: Callable[[Any, Any], Any]) -> Any:
    """The step's end; seconds may be numbers or arrays of one shape."""
    last = len(groups) - 1
    sizes = [len(group.replicas) for group in groups]
    windows = tuple(sum(sizes[k:]) + group.ahead for k, group in enumerate(groups))
    order = evaluation_order(windows, num_micro_batches, tuple(g.replicas[0].has_backward for g in groups))
    owners = [group.owners or (0,) * num_micro_batches for group in groups]
    forwards = [[cost.forward_s for cost in group.replicas] for group in groups]
    backwards = [[cost.backward_s for cost in group.replicas] for group in groups]
    wants_gradient = [k < last and group.replicas[0].gets_gradient for k, group in enumerate(groups)]
    free_at: list[list[Any]] = [[0.0] * size for size in sizes]
    # When each direction of the link from a replica to one of the next stage is free again.
    down_free_at: list[list[list[Any]]] = [[[0.0] * sizes[k + 1] for _ in range(sizes[k])] for k in range(last)]
    up_free_at: list[list[list[Any]]] = [[[0.0] * sizes[k + 1] for _ in range(sizes[k])] for k in range(last)]
    # When the input of micro-batch m's forward (backward) pass is there.
    forward_at: list[list[Any]] = [[0.0] * num_micro_batches for _ in groups]
    backward_at: list[list[Any]] = [[0.0] * num_micro_batches for _ in groups]
    for k, is_forward, m in order:
        replica = owners[k][m]
        if is_forward:
            end_s = later(free_at[k][replica], forward_at[k][m]) + forwards[k][replica]
            if k < last:
                below = owners[k + 1][m]
                busy_s, latency_s = groups[k].links[replica][below]
                sent_s = later(end_s, down_free_at[k][replica][below]) + busy_s
                down_free_at[k][replica][below] = sent_s
                forward_at[k + 1][m] = sent_s + latency_s
            else:
                backward_at[k][m] = end_s
        else:
            end_s = later(free_at[k][replica], backward_at[k][m]) + backwards[k][replica]
            if k > 0 and wants_gradient[k - 1]:
                above = owners[k - 1][m]
                busy_s, latency_s = groups[k - 1].links[above][replica]
                sent_s = later(end_s, up_free_at[k - 1][above][replica]) + busy_s
                up_free_at[k - 1][above][replica] = sent_s
                backward_at[k - 1][m] = sent_s + latency_s
        free_at[k][replica] = end_s
    end: Any = 0.0
    for group, ends in zip(groups, free_at, strict=True):
        stage_end: Any = 0.0
        for replica_end in ends:
            stage_end = later(stage_end, replica_end)
        end = later(end, stage_end + group.sum_s)
    return end


def _counts(group: StageGroup, num_micro_batches: int) -> list[int]:
    if not group.owners:
        return [num_micro_batches]
    return [group.owners.count(replica) for replica in range(len(group.replicas))]


def _link_busy_s(group: StageGroup, below: StageGroup, num_micro_batches: int) -> float:
    here = group.owners or (0,) * num_micro_batches
    there = below.owners or (0,) * num_micro_batches
    carried: dict[tuple[int, int], float] = {}
    for pair in zip(here, there, strict=True):
        carried[pair] = carried.get(pair, 0.0) + group.links[pair[0]][pair[1]][0]
    return max(carried.values(), default=-math.inf)
