"""Scoring a job's held-out rows, once before and once after its training."""

from __future__ import annotations

import asyncio

from coordinator.jobs.context import JobContext
from coordinator.jobs.prepared import PreparedData
from coordinator.jobs.units import score
from coordinator.storage.base import ScoringMoment
from plutino.events import ScoredRow, ScoringDone

_SHOWN_ROWS = 5


async def score_once(context: JobContext, prepared: PreparedData, moment: ScoringMoment) -> None:
    """Score the held-out rows, unless that was done before a restart."""
    if moment in context.store.scores(context.job_id):
        return
    report, seconds = await score(context, prepared, use_adapter=moment == "after")
    seen = ScoringDone(
        when=moment,
        num_rows=report.num_rows,
        metrics=report.values,
        sample_rows=tuple(
            ScoredRow(prompt=s.prompt, expected=s.truth, answer=s.answer, is_right=s.answer.strip() == s.truth.strip())
            for s in report.samples[:_SHOWN_ROWS]
        ),
        seconds=seconds,
    )
    await asyncio.wrap_future(context.store.put_scores(context.job_id, moment, report.model_dump_json()))
    await context.tell(seen)
