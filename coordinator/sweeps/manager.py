"""All sweeps of a coordinator: hands their trials in as ordinary jobs, one after the other, and compares them.

A sweep has no state of its own but its spec and whether it was cancelled: its jobs are found by idempotency keys made
of the sweep's id, the trial and the rung, and everything else follows from them. A restarted coordinator therefore goes
on by asking for the same jobs again.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import Sequence
from dataclasses import replace

from pydantic import BaseModel, ConfigDict

from coordinator.jobs.context import TrialTerms
from coordinator.jobs.manager import JobManager
from coordinator.jobs.record import JobRecord, JobState
from coordinator.jobs.scoring import ScoreReport
from coordinator.jobs.trained import trained_share
from coordinator.storage.base import Store
from coordinator.sweeps.choose import ranked, recommend
from coordinator.sweeps.grid import label
from coordinator.sweeps.results import result_of
from coordinator.sweeps.trial_jobs import (
    adapter_key,
    check_halving,
    first_of_group,
    group_of,
    rungs_of,
    shared_terms,
    trial_job,
    trial_key,
)
from plutino.errors import InvalidTransitionError, PlutinoError, UnknownJobError
from plutino.sweep import Recommendation, SweepSpec, SweepStatus, TrialResult
from plutino.types import JobId

logger = logging.getLogger(__name__)

KEEPS_STAGE_S = 60.0
"""A worker waits so long for the next trial: planning one takes a second, and the first rows are tokenised already."""
_INDEX_KEY = "sweeps"


class _Record(BaseModel):
    """What is stored of a sweep."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sweep_id: str
    spec: SweepSpec
    submitted_at_s: float
    is_cancelled: bool = False
    failure: str = ""
    ended_at_s: float | None = None


class SweepManager:
    """Sweeps by id. Use it on the coordinator's event loop."""

    def __init__(self, store: Store, jobs: JobManager, *, keeps_stage_s: float = KEEPS_STAGE_S) -> None:
        self._store = store
        self._jobs = jobs
        self._keeps_stage_s = keeps_stage_s
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._trained: dict[str, tuple[int, float]] = {}
        self._terms: dict[str, dict[str, TrialTerms]] = {}
        self._results: dict[str, TrialResult] = {}
        """Of jobs that have ended, by id: people look every second, and a job's steps are many."""

    # ---- life ----

    def living_trials(self) -> dict[JobId, TrialTerms]:
        """What the living jobs of sweeps share: they go on as trials, with their stages kept for the next one."""
        found: dict[JobId, TrialTerms] = {}
        for record in (self._record(sweep_id) for sweep_id in self._ids()):
            if record.ended_at_s is not None:
                continue
            for rung in range(len(rungs_of(record.spec))):
                for number in range(len(record.spec.trials)):
                    if (job := self._job(record, number, rung)) is not None and not job.is_terminal:
                        found[job.job_id] = self._terms_of(record, number)
            last, chosen = self._adapter_job(record), self._recommendation(record)
            if last is not None and chosen is not None and not last.is_terminal:
                found[last.job_id] = self._last_terms(record, chosen.trial)
        return found

    def resume_all(self) -> None:
        """Go on with every stored sweep that has not ended."""
        for sweep_id in self._ids():
            if self._record(sweep_id).ended_at_s is None:
                logger.info("sweep %s goes on", sweep_id)
                self._start(sweep_id)

    async def close(self) -> None:
        """Stop handing jobs in; sweeps stay as they are stored."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    # ---- what people ask ----

    async def submit(self, spec: SweepSpec, *, idempotency_key: str) -> str:
        """Store a sweep and begin it; gives its id.

        Raises:
            ConfigError, ModelError: a trial's method does not fit its base model, or there is nothing to halve.
        """
        key = f"sweep submitted as {idempotency_key}"
        if idempotency_key and (known := self._store.value(key)) is not None:
            return known
        check_halving(spec)
        for trial in spec.trials:
            await asyncio.to_thread(trained_share, trial.spec)
        letters = "".join(c for c in spec.name.lower() if c.isalnum() or c == "-")[:20].strip("-") or "sweep"
        sweep_id = f"{letters}-{secrets.token_hex(3)}"
        await self._save(_Record(sweep_id=sweep_id, spec=spec, submitted_at_s=time.time()))
        # After the sweep itself: an index that names a sweep which is not there would stop the coordinator's start.
        await asyncio.wrap_future(self._store.put_value(_INDEX_KEY, json.dumps([*self._ids(), sweep_id])))
        if idempotency_key:
            await asyncio.wrap_future(self._store.put_value(key, sweep_id))
        self._start(sweep_id)
        return sweep_id

    def find(self, text: str) -> str:
        """The id of the sweep with this id, or of the only one whose id starts so.

        Raises:
            UnknownJobError: none, or several.
        """
        ids = self._ids()
        found = [text] if text in ids else [sweep_id for sweep_id in ids if sweep_id.startswith(text)]
        if len(found) != 1:
            known = ", ".join((found or ids)[-5:]) or "there are no sweeps"
            raise UnknownJobError(f"{'several sweeps begin with' if found else 'no sweep'} {text!r}: {known}")
        return found[0]

    def status(self, sweep_id: str) -> SweepStatus:
        """A sweep as far as it has come.

        Raises:
            UnknownJobError: no sweep has this id.
        """
        record = self._record(sweep_id)
        results = [self._latest(record, number) for number in range(len(record.spec.trials))]
        adapter = self._adapter_job(record)
        recommendation = self._recommendation(record)
        return SweepStatus(
            sweep_id=sweep_id,
            name=record.spec.name,
            state=_state(record),
            reason=record.failure,
            base_score=self._base_score(record),
            results=tuple(results),
            recommendation=recommendation,
            adapter_job_id=None if adapter is None else adapter.job_id,
            adapter_dir=None if adapter is None else adapter.adapter_dir,
            total_s=(record.ended_at_s or time.time()) - record.submitted_at_s,
        )

    def list_all(self) -> list[SweepStatus]:
        """All sweeps, oldest first."""
        return [self.status(sweep_id) for sweep_id in self._ids()]

    async def cancel(self, sweep_id: str) -> SweepStatus:
        """End a sweep with the job that it runs; what was measured stays.

        Raises:
            UnknownJobError: no sweep has this id.
            InvalidTransitionError: it has ended already.
        """
        record = self._record(sweep_id)
        if record.ended_at_s is not None:
            raise InvalidTransitionError(f"sweep {sweep_id} has ended already: {_state(record)}")
        await self._save(record.model_copy(update={"is_cancelled": True}))
        task = self._tasks.get(sweep_id)
        if task is not None:
            task.cancel()
            await asyncio.wait({task})
        for job in self._all_jobs(record):
            if not job.is_terminal:
                await self._jobs.cancel(job.job_id)
        await self._end(self._record(sweep_id))
        return self.status(sweep_id)

    # ---- running ----

    def _start(self, sweep_id: str) -> None:
        self._tasks[sweep_id] = asyncio.create_task(self._run(sweep_id), name=f"sweep {sweep_id}")

    async def _run(self, sweep_id: str) -> None:
        try:
            await self._run_rungs(self._record(sweep_id))
            await self._end(self._record(sweep_id))
        except PlutinoError as error:
            await self._end(self._record(sweep_id), failure=str(error))
        except Exception as error:
            logger.exception("sweep %s failed", sweep_id)
            reason = f"the coordinator failed ({type(error).__name__}: {error}); see its log"
            await self._end(self._record(sweep_id), failure=reason)

    async def _run_rungs(self, record: _Record) -> None:
        rungs = rungs_of(record.spec)
        chosen = list(range(len(record.spec.trials)))
        for rung_number, rung in enumerate(rungs):
            # Trials of the same stages one after the other, so that these stay loaded.
            chosen = sorted(chosen[: rung.num_trials], key=lambda number: (first_of_group(record.spec, number), number))
            for number in chosen:
                spec = trial_job(record.spec, number, rung, is_first=(rung_number, number) == (0, chosen[0]))
                job = await self._jobs.submit(
                    spec,
                    idempotency_key=trial_key(record.sweep_id, number, rung_number),
                    trial=self._terms_of(record, number),
                )
                await self._jobs.ended(job.job_id)
            results = [self._result(record, number, rung_number) for number in chosen]
            chosen = [result.trial for result in ranked([result for result in results if result is not None])]
        if not record.spec.trains:
            return self._check_all_scored(record)
        recommendation = self._recommendation(record)
        if recommendation is None:
            numbers = range(len(record.spec.trials))
            why = next((reason for number in numbers if (reason := self._latest(record, number).reason)), "")
            raise PlutinoError(f"no trial could be measured; the first that failed: {why or 'no reason was told'}")
        spec = record.spec.trials[recommendation.trial].spec
        last = self._last_terms(record, recommendation.trial)
        job = await self._jobs.submit(spec, idempotency_key=adapter_key(record.sweep_id), trial=last)
        ended = await self._jobs.ended(job.job_id)
        if ended.state is not JobState.SUCCEEDED:
            raise PlutinoError(f"the recommended trial's job {job.job_id} is {ended.state.value}: {ended.reason}")

    def _check_all_scored(self, record: _Record) -> None:
        results = [self._latest(record, number) for number in range(len(record.spec.trials))]
        if failed := [result for result in results if result.state != "succeeded" or not result.values]:
            names = ", ".join(label(result.settings) for result in failed)
            raise PlutinoError(f"{len(failed)} of {len(results)} could not be answered ({names}): {failed[0].reason}")

    # ---- reading ----

    def _ids(self) -> list[str]:
        return list(json.loads(self._store.value(_INDEX_KEY) or "[]"))

    def _record(self, sweep_id: str) -> _Record:
        text = self._store.value(f"sweep {sweep_id}")
        if text is None:
            known = ", ".join(self._ids()[-5:]) or "there are no sweeps"
            raise UnknownJobError(f"no sweep {sweep_id!r}; the latest: {known}")
        return _Record.model_validate_json(text)

    async def _save(self, record: _Record) -> None:
        await asyncio.wrap_future(self._store.put_value(f"sweep {record.sweep_id}", record.model_dump_json()))

    async def _end(self, record: _Record, *, failure: str = "") -> None:
        await self._save(record.model_copy(update={"ended_at_s": time.time(), "failure": failure}))
        self._tasks.pop(record.sweep_id, None)
        self._terms.pop(record.sweep_id, None)

    def _terms_of(self, record: _Record, number: int) -> TrialTerms:
        if record.sweep_id not in self._terms:
            self._terms[record.sweep_id] = shared_terms(record.spec, self._keeps_stage_s)
        # Not by the job's own spec, whose base model is pinned to a revision.
        return self._terms[record.sweep_id][group_of(record.spec.trials[number].spec)]

    def _last_terms(self, record: _Record, number: int) -> TrialTerms:
        return replace(self._terms_of(record, number), keeps_stage_s=0.0)

    def _job(self, record: _Record, number: int, rung: int) -> JobRecord | None:
        known = self._store.submitted_as(trial_key(record.sweep_id, number, rung))
        return None if known is None else self._store.job(known.job_id)

    def _adapter_job(self, record: _Record) -> JobRecord | None:
        known = self._store.submitted_as(adapter_key(record.sweep_id))
        return None if known is None else self._store.job(known.job_id)

    def _all_jobs(self, record: _Record) -> list[JobRecord]:
        numbers, rungs = range(len(record.spec.trials)), range(len(rungs_of(record.spec)))
        jobs = [self._job(record, number, rung) for rung in rungs for number in numbers]
        return [job for job in (*jobs, self._adapter_job(record)) if job is not None]

    def _result(self, record: _Record, number: int, rung: int) -> TrialResult | None:
        job = self._job(record, number, rung)
        if job is None:
            return None
        if (known := self._results.get(job.job_id)) is not None:
            return known
        trial = record.spec.trials[number]
        key = trial.spec.model.model_dump_json() + trial.spec.method.model_dump_json()
        if key not in self._trained:
            self._trained[key] = trained_share(trial.spec)
        result = result_of(self._store, number, trial, rung, job, self._trained[key], now_s=time.time())
        if job.is_terminal:
            self._results[job.job_id] = result
        return result

    def _latest(self, record: _Record, number: int) -> TrialResult:
        """A trial's job of the highest rung that it has reached."""
        rungs = range(len(rungs_of(record.spec)))
        found = [result for rung in rungs if (result := self._result(record, number, rung)) is not None]
        if not found:
            return TrialResult(trial=number, settings=record.spec.trials[number].settings)
        is_dropped = found[-1].state == "succeeded" and number not in self._promoted(record, found[-1].rung)
        return found[-1].model_copy(update={"state": "dropped"}) if is_dropped else found[-1]

    def _promoted(self, record: _Record, rung: int) -> Sequence[int]:
        """The trials that go on after a round, or all while that is not decided."""
        numbers, rungs = range(len(record.spec.trials)), rungs_of(record.spec)
        if rung + 1 == len(rungs) or not any(self._job(record, number, rung + 1) for number in numbers):
            return numbers
        results = [result for number in numbers if (result := self._result(record, number, rung)) is not None]
        return [result.trial for result in ranked(results)][: rungs[rung + 1].num_trials]

    def _recommendation(self, record: _Record) -> Recommendation | None:
        """Among the jobs of the highest rung that has a measured one: only they had the same steps."""
        if not record.spec.trains:
            return None
        for rung in reversed(range(len(rungs_of(record.spec)))):
            results = [self._result(record, number, rung) for number in range(len(record.spec.trials))]
            if (found := recommend([result for result in results if result is not None])) is not None:
                return found
        return None

    def _base_score(self, record: _Record) -> float | None:
        for job in self._all_jobs(record):
            if (before := self._store.scores(job.job_id).get("before")) is not None:
                return ScoreReport.model_validate_json(before).share
        return None


def _state(record: _Record) -> str:
    if record.is_cancelled:
        return "cancelled"
    if record.ended_at_s is None:
        return "running"
    return "failed" if record.failure else "succeeded"
