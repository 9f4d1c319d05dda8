"""What the store knows of a trial's job, as a result."""

from __future__ import annotations

from coordinator.jobs.record import JobRecord
from coordinator.jobs.scoring import ScoreReport
from coordinator.jobs.trained import committed_steps
from coordinator.storage.base import Store
from plutino.sweep import Trial, TrialResult


def result_of(
    store: Store, number: int, trial: Trial, rung: int, record: JobRecord, trained: tuple[int, float], *, now_s: float
) -> TrialResult:
    """A trial as its latest job stands."""
    steps = committed_steps(store, record.job_id)
    peaks = [times.peak_rss_bytes for step in steps for times in step.workers]
    losses = {row.step: row.loss for row in store.evaluations(record.job_id)}
    eval_loss = (min(losses.values()) if trial.spec.training.keep_best else losses[max(losses)]) if losses else None
    after = store.scores(record.job_id).get("after")
    report = None if after is None else ScoreReport.model_validate_json(after)
    return TrialResult(
        trial=number,
        settings=trial.settings,
        rung=rung,
        job_id=record.job_id,
        state=record.state.value,
        reason=record.reason,
        steps=record.next_step,
        score=None if report is None else report.share,
        num_scored=0 if report is None else report.num_rows,
        values={} if report is None else report.values,
        eval_loss=eval_loss,
        trained_params=trained[0],
        trained_share=trained[1],
        peak_bytes=max(peaks, default=0),
        train_s=sum(step.seconds for step in steps),
        total_s=(record.ended_at_s or now_s) - record.submitted_at_s,
    )
