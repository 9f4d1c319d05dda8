from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.jobs.barrier import Abort, AbortKind, Barrier, Commit, Vote, decide, open_barrier
from plutino.types import JobId, WorkerRef

JOB = JobId("job-1")


def worker(stage_index: int, replica_index: int = 0, plan_epoch: int = 3) -> WorkerRef:
    return WorkerRef(JOB, plan_epoch, stage_index, replica_index)


def vote(stage_index: int, norms: dict[str, float], **more: object) -> Vote:
    values = {"worker": worker(stage_index), "step": 7, "squared_norms": norms, **more}
    return Vote(**values)  # type: ignore[arg-type]


def barrier_of(*votes: Vote, num_workers: int | None = None) -> Barrier:
    barrier = open_barrier(step=7, workers=map(worker, range(num_workers or len(votes))), loss_weight=4.0)
    for each in votes:
        barrier = barrier.add_vote(each)
    return barrier


def test_decide_waits_for_the_last_vote_even_if_one_is_not_finite() -> None:
    barrier = barrier_of(vote(0, {}, finite=False, reason="loss is nan"), num_workers=2)

    assert decide(barrier, 1.0) is None
    assert barrier.missing == (worker(1),)


def test_decide_complete_commits_with_global_norm_and_mean_loss() -> None:
    barrier = barrier_of(vote(0, {"a": 9.0}), vote(1, {"b": 16.0}, loss_sum=6.0))

    assert decide(barrier, 1.0) == Commit(clip_scale=1.0 / (5.0 + 1e-6), total_norm=5.0, loss=1.5)


@pytest.mark.parametrize("max_grad_norm", [None, 5.1, 100.0])
def test_decide_small_gradient_is_not_scaled(max_grad_norm: float | None) -> None:
    decision = decide(barrier_of(vote(0, {"a": 9.0}), vote(1, {"b": 16.0})), max_grad_norm)

    assert isinstance(decision, Commit)
    assert decision.clip_scale == 1.0


def test_decide_parameter_with_two_holders_counts_once() -> None:
    decision = decide(barrier_of(vote(0, {"wte": 9.0}), vote(1, {"wte": 9.0, "b": 16.0})), None)

    assert isinstance(decision, Commit)
    assert decision.total_norm == 5.0


def test_decide_holders_that_differ_abort_with_name_and_values() -> None:
    decision = decide(barrier_of(vote(0, {"wte": 9.0}), vote(1, {"wte": 9.000000000000002})), None)

    assert isinstance(decision, Abort)
    assert decision.kind is AbortKind.SPLIT_BRAIN
    assert "wte is 9.0 on stage 0.0 and 9.000000000000002 on stage 1.0" in decision.reason


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (vote(1, {}, finite=False, reason="loss is nan in micro-batch 2"), "stage 1.0: loss is nan in micro-batch 2"),
        (vote(1, {"b": math.inf}), "stage 1.0: the squared norm of b is inf"),
        (vote(1, {"b": 1.0}, loss_sum=math.nan), "stage 1.0: its loss sum is nan"),
    ],
)
def test_decide_vote_that_is_not_finite_aborts_naming_the_stage(bad: Vote, said: str) -> None:
    decision = decide(barrier_of(vote(0, {"a": 1.0}), bad), 1.0)

    assert isinstance(decision, Abort)
    assert decision.kind is AbortKind.NOT_FINITE
    assert said in decision.reason


def test_decide_finite_norms_whose_sum_overflows_abort() -> None:
    decision = decide(barrier_of(vote(0, {"a": 1.7e308}), vote(1, {"b": 1.7e308})), 1.0)

    assert isinstance(decision, Abort)
    assert "norm inf" in decision.reason


def test_add_vote_duplicate_is_counted_and_the_first_stands() -> None:
    barrier = barrier_of(vote(0, {"a": 9.0}), num_workers=1).add_vote(vote(0, {"a": 1.0}))

    assert barrier.num_duplicates == 1
    assert barrier.votes[worker(0)].squared_norms == {"a": 9.0}


@pytest.mark.parametrize("stale", [vote(0, {}, step=6), vote(0, {}, worker=worker(0, plan_epoch=2)), vote(5, {})])
def test_add_vote_of_another_step_epoch_or_worker_is_counted_as_stale(stale: Vote) -> None:
    barrier = barrier_of(num_workers=1).add_vote(stale)

    assert (barrier.num_stale, dict(barrier.votes)) == (1, {})


@pytest.mark.parametrize(
    ("workers", "loss_weight"), [([], 1.0), ([worker(0)], 0.0), ([worker(0), worker(1, plan_epoch=4)], 1.0)]
)
def test_open_barrier_without_one_plan_or_labels_is_refused(workers: list[WorkerRef], loss_weight: float) -> None:
    with pytest.raises(ValueError, match=r"barrier needs|label token"):
        open_barrier(step=7, workers=workers, loss_weight=loss_weight)


@given(
    norms=st.lists(st.floats(0, 1e6), min_size=1, max_size=12),
    num_stages=st.integers(1, 4),
    seed=st.integers(0, 2**16),
)
def test_decide_is_the_same_for_any_order_of_votes_and_any_partition(
    norms: list[float], num_stages: int, seed: int
) -> None:
    named = {f"p{index}": value for index, value in enumerate(norms)}
    whole = decide(barrier_of(vote(0, named, loss_sum=2.0)), 1.0)
    parts = [dict(list(named.items())[stage::num_stages]) for stage in range(num_stages)]
    votes = [vote(stage, part, loss_sum=2.0 if stage == num_stages - 1 else 0.0) for stage, part in enumerate(parts)]

    random.Random(seed).shuffle(votes)

    assert decide(barrier_of(*votes), 1.0) == whole
