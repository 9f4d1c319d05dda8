"""Workers' votes on a step, as the barrier and as people take them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from coordinator.jobs.barrier import Vote
from coordinator.jobs.context import JobContext
from coordinator.jobs.worker_link import WorkerStatus
from plutino.events import WorkerStepTimes


def vote_of(status: WorkerStatus) -> Vote:
    """A worker's vote."""
    vote, loaded = status.vote, status.loaded
    assert vote is not None and loaded is not None
    return Vote(
        worker=status.ref,
        step=vote.step,
        squared_norms=dict(zip(loaded.parameter_names, vote.squared_norms, strict=True)),
        finite=vote.finite,
        loss_sum=vote.loss_sum,
        reason=vote.reason,
    )


def times_of(context: JobContext, status: WorkerStatus) -> WorkerStepTimes:
    """Where a worker's seconds of the step went."""
    assert status.vote is not None
    times = status.vote.times
    return WorkerStepTimes(
        worker=context.worker_name(status.ref),
        total_s=times.total_s,
        compute_s=times.compute_s,
        wait_s=times.wait_s,
        serialise_s=times.serialise_s,
        commit_s=times.commit_s,
        sent_bytes=times.sent_bytes,
        rss_bytes=times.rss_bytes,
        peak_rss_bytes=times.peak_rss_bytes,
        cached_rows=times.cached_rows,
        left_out_rows=times.left_out_rows,
        damaged_entries=times.damaged_entries,
    )


def counts_of(statuses: Iterable[WorkerStatus], rollouts: Mapping[str, float]) -> dict[str, float]:
    """What people see of a step on sampled answers; empty of other steps.

    Args:
        statuses: workers that have voted.
        rollouts: what is known of the answers.
    """
    if not rollouts:
        return {}
    sums: dict[str, float] = {}
    for status in statuses:
        for name, count in ({} if status.vote is None else status.vote.counts).items():
            sums[name] = sums.get(name, 0.0) + count
    num_tokens = sums.get("num_tokens", 0.0) or 1.0
    shares = {"clipped_share": sums.get("num_clipped", 0.0) / num_tokens}
    if "kl_sum" in sums:
        shares["kl"] = sums["kl_sum"] / num_tokens
    return {**rollouts, **shares}
