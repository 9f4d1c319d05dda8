"""What the store knows of a trial's job, as a result."""

from __future__ import annotations

import math

from coordinator.jobs.planning import read_model
from coordinator.jobs.record import JobRecord
from coordinator.jobs.scoring import ScoreReport
from coordinator.storage.base import NumberedEvent, Store
from partitioner.adapter import adapter_params_of
from plutino.events import StepCommitted
from plutino.hub_id import index_folder, model_folder
from plutino.job.spec import JobSpec
from plutino.random_weights import read_random_weights
from plutino.safetensors_index import read_safetensors_headers
from plutino.sweep import Trial, TrialResult

_EVENTS_AT_ONCE = 1000


def trained_share(spec: JobSpec) -> tuple[int, float]:
    """Parameters that a job trains, and their share of the base model's.

    Raises:
        ModelError: the base model cannot be read.
        ConfigError: the method does not fit it.
    """
    _, table = read_model(spec)
    folder = model_folder(spec.model.path)
    tensors = read_random_weights(folder) or read_safetensors_headers(index_folder(folder))
    total = sum(math.prod(entry.shape) for entry in tensors.values())
    trained = adapter_params_of(table, spec.method).num_params
    return trained, trained / total


def result_of(
    store: Store, number: int, trial: Trial, rung: int, record: JobRecord, trained: tuple[int, float], *, now_s: float
) -> TrialResult:
    """A trial as its latest job stands."""
    steps = [event for numbered in _events(store, record) if isinstance(event := numbered.event, StepCommitted)]
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


def _events(store: Store, record: JobRecord) -> list[NumberedEvent]:
    found: list[NumberedEvent] = []
    while more := store.events(record.job_id, after=len(found), limit=_EVENTS_AT_ONCE):
        found += more
    return found
