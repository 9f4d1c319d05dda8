"""The commit decision of one optimiser step: pure, and independent of the order in which votes come.

One round trip is at once the norm's all-reduce, the NaN guard, the vote and the fence. Entry points: :class:`Barrier`,
:func:`decide`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum

from plutino.types import WorkerRef


@dataclass(frozen=True, slots=True, kw_only=True)
class Vote:
    """One worker holds all its gradients of a step and is bound to it."""

    worker: WorkerRef
    step: int
    squared_norms: Mapping[str, float]
    """Squared L2 norm of each parameter's whole gradient, by global name."""
    finite: bool = True
    loss_sum: float = 0.0
    """Sum of token losses over the worker's micro-batches; 0 on all stages but the last."""
    reason: str = ""
    """Why the gradients are not finite, if they are not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """Every worker applies the step."""

    clip_scale: float
    """Multiplies every gradient."""
    total_norm: float
    """Global gradient norm before clipping."""
    loss: float
    """Mean loss of the step's label tokens."""


class AbortKind(str, Enum):
    """What an abort means for the job."""

    NOT_FINITE = "not_finite"
    """The step is skipped; the job goes on."""
    SPLIT_BRAIN = "split_brain"
    """Holders of one parameter disagree: their copies may have drifted apart, so going on would publish nonsense."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Abort:
    """Every worker drops its gradients of the step."""

    kind: AbortKind
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Barrier:
    """The votes on one step so far."""

    plan_epoch: int
    step: int
    expected: frozenset[WorkerRef]
    """All workers of the plan."""
    loss_weight: float
    """Number of label tokens of the whole step."""
    votes: Mapping[WorkerRef, Vote] = field(default_factory=dict)
    num_duplicates: int = 0
    num_stale: int = 0
    """Votes of another step, plan epoch or job."""

    @property
    def missing(self) -> tuple[WorkerRef, ...]:
        """Workers that have not voted, by stage."""
        return tuple(sorted(self.expected - self.votes.keys()))

    def add_vote(self, vote: Vote) -> Barrier:
        """The barrier with this vote; a duplicate or a stale one is only counted, and the first vote stands."""
        if vote.step != self.step or vote.worker not in self.expected:
            return replace(self, num_stale=self.num_stale + 1)
        if vote.worker in self.votes:
            return replace(self, num_duplicates=self.num_duplicates + 1)
        return replace(self, votes={**self.votes, vote.worker: vote})


def open_barrier(*, step: int, workers: Iterable[WorkerRef], loss_weight: float) -> Barrier:
    """An empty barrier for one step of one plan.

    Raises:
        ValueError: no workers, workers of several plans, or a step without a label token.
    """
    expected = frozenset(workers)
    epochs = {(worker.job_id, worker.plan_epoch) for worker in expected}
    if len(epochs) != 1:
        raise ValueError(f"a barrier needs the workers of exactly one plan, not of {len(epochs)}")
    if not loss_weight > 0:
        raise ValueError(f"step {step} has a loss weight of {loss_weight}: a step needs at least one label token")
    return Barrier(plan_epoch=epochs.pop()[1], step=step, expected=expected, loss_weight=loss_weight)


def decide(barrier: Barrier, max_grad_norm: float | None) -> Commit | Abort | None:
    """The step's fate, or None while votes are missing.

    It waits for every vote even when one is not finite: the outcome and its reason must not depend on who came first.
    The norm sums each parameter once, in the order of global names, so that no partition changes its bits; the clip
    scale is that of ``torch.nn.utils.clip_grad_norm_``. ``max_grad_norm`` None does not clip.
    """
    if barrier.missing:
        return None
    votes = [barrier.votes[worker] for worker in sorted(barrier.votes)]
    problems = [problem for vote in votes for problem in _not_finite(vote)]
    if problems:
        return Abort(kind=AbortKind.NOT_FINITE, reason=f"step {barrier.step}: " + "; ".join(problems))
    disagreements = list(_disagreements(votes))
    if disagreements:
        return Abort(
            kind=AbortKind.SPLIT_BRAIN,
            reason=f"step {barrier.step}: holders of one parameter disagree on its gradient: "
            + "; ".join(disagreements),
        )
    norms = {name: value for vote in votes for name, value in vote.squared_norms.items()}
    norm = total_norm(norms)
    loss = sum(vote.loss_sum for vote in votes) / barrier.loss_weight
    if not (math.isfinite(norm) and math.isfinite(loss)):
        return Abort(
            kind=AbortKind.NOT_FINITE,
            reason=f"step {barrier.step}: every stage is finite, but their sums are not: norm {norm}, loss {loss}",
        )
    return Commit(clip_scale=clip_scale(norm, max_grad_norm), total_norm=norm, loss=loss)


def total_norm(squared_norms: Mapping[str, float]) -> float:
    """Global L2 norm from each parameter's squared one, summed in the order of names."""
    total = 0.0
    for name in sorted(squared_norms):
        total += squared_norms[name]
    return math.sqrt(total)


def clip_scale(norm: float, max_grad_norm: float | None) -> float:
    """What multiplies every gradient so that the global norm is at most ``max_grad_norm``."""
    # 1e-6 as in torch: the scale must equal that of an undivided run to the bit.
    return 1.0 if max_grad_norm is None else min(1.0, max_grad_norm / (norm + 1e-6))


def _not_finite(vote: Vote) -> Iterator[str]:
    where = f"stage {vote.worker.stage_index}.{vote.worker.replica_index}"
    if not vote.finite:
        yield f"{where}: {vote.reason or 'its gradients are not finite'}"
        return
    if not math.isfinite(vote.loss_sum):
        yield f"{where}: its loss sum is {vote.loss_sum}"
    bad = sorted(name for name, value in vote.squared_norms.items() if not math.isfinite(value) or value < 0)
    if bad:
        yield f"{where}: the squared norm of {bad[0]} is {vote.squared_norms[bad[0]]}" + (
            f" ({len(bad)} parameters in all)" if len(bad) > 1 else ""
        )


def _disagreements(votes: Iterable[Vote]) -> Iterator[str]:
    first: dict[str, Vote] = {}
    for vote in votes:
        for name, value in vote.squared_norms.items():
            other = first.setdefault(name, vote)
            if other.squared_norms[name] != value:
                yield (
                    f"{name} is {other.squared_norms[name]!r} on stage {other.worker.stage_index}."
                    f"{other.worker.replica_index} and {value!r} on stage {vote.worker.stage_index}."
                    f"{vote.worker.replica_index}"
                )
