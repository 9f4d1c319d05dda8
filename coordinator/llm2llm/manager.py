"""All LLM2LLM loops of a coordinator: each round is an ordinary job, and its questions go to the teacher.

A loop has no state but what :mod:`coordinator.llm2llm.records` stores: its jobs are found by idempotency keys made of
the loop's id and the round, the rows of a round follow from the outcomes of the rounds before. A restarted coordinator
goes on in the middle of a round, and asks only what has no reply yet.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from pathlib import Path

from coordinator.jobs.manager import JobManager
from coordinator.jobs.record import JobRecord, JobState
from coordinator.jobs.scoring import ScoreReport
from coordinator.llm2llm.questions import RoundQuestions, Seeds
from coordinator.llm2llm.records import LoopRecord, LoopRecords, RoundOutcome
from coordinator.llm2llm.rounds import HELD_OUT, SEED, ending_reason, num_trainings, round_rows, round_spec
from coordinator.llm2llm.rows import read_seeds
from coordinator.llm2llm.teachers.opening import open_teacher
from coordinator.storage.base import Store
from plutino.errors import ConfigError, InvalidTransitionError, JobError, PlutinoError
from plutino.job.objective import ClassificationConfig
from plutino.llm2llm import LoopSpec, LoopStatus, RoundStatus, Sample, check_loop

logger = logging.getLogger(__name__)


class LoopManager:
    """Loops by id. Use it on the coordinator's event loop."""

    def __init__(self, store: Store, jobs: JobManager, state_dir: Path) -> None:
        self._store = store
        self._jobs = jobs
        self._dir = state_dir / "llm2llm"
        self._records = LoopRecords(store)
        self._tasks: dict[str, asyncio.Task[None]] = {}

    # ---- life ----

    def resume_all(self) -> None:
        """Go on with every stored loop that has not ended."""
        for loop_id in self._records.ids():
            if self._records.get(loop_id).ended_at_s is None:
                logger.info("loop %s goes on", loop_id)
                self._start(loop_id)

    async def close(self) -> None:
        """Stop handing jobs in and asking; loops stay as they are stored."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    # ---- what people ask ----

    async def submit(self, spec: LoopSpec, *, idempotency_key: str) -> str:
        """Store a loop and begin it; gives its id.

        Raises:
            ConfigError, DataError: its seed, its job or its teacher cannot be used.
        """
        if (known := self._records.submitted_as(idempotency_key)) is not None:
            return known
        check_loop(spec)
        await asyncio.to_thread(_seeds, spec)
        letters = "".join(c for c in spec.name.lower() if c.isalnum() or c == "-")[:20].strip("-") or "loop"
        loop_id = f"{letters}-{secrets.token_hex(3)}"
        open_teacher(spec, name=loop_id, folder=self._dir / loop_id, jobs=self._jobs, store=self._store)
        record = LoopRecord(loop_id=loop_id, spec=spec, submitted_at_s=time.time())
        await self._records.add(record, idempotency_key)
        self._start(loop_id)
        return loop_id

    def find(self, text: str) -> str:
        """See :meth:`coordinator.llm2llm.records.LoopRecords.find`."""
        return self._records.find(text)

    def status(self, loop_id: str) -> LoopStatus:
        """A loop as far as it has come.

        Raises:
            UnknownJobError: no loop has this id.
        """
        record = self._records.get(loop_id)
        rounds: list[RoundStatus] = []
        for number in range(num_trainings(record.spec)):
            job = self._job(record, number)
            if number and job is None:
                break
            rounds.append(self._round_status(record, number, job))
        adapter = self._adapter_job(record)
        return LoopStatus(
            loop_id=loop_id,
            name=record.spec.name,
            state=record.state,
            reason=record.failure,
            rounds=tuple(rounds),
            data_dir=str(self._dir / loop_id),
            adapter_job_id=None if adapter is None else adapter.job_id,
            adapter_dir=None if adapter is None else adapter.adapter_dir,
            total_s=(record.ended_at_s or time.time()) - record.submitted_at_s,
        )

    def list_all(self) -> list[LoopStatus]:
        """All loops, oldest first."""
        return [self.status(loop_id) for loop_id in self._records.ids()]

    def samples(self, loop_id: str) -> list[Sample]:
        """Everything that came of the teacher's answers in rounds that are done."""
        record = self._records.get(loop_id)
        return [sample for outcome in self._outcomes(record) for sample in outcome.samples]

    async def cancel(self, loop_id: str) -> LoopStatus:
        """End a loop with the job that it runs; everything that it has stays, and it can be resumed.

        Raises:
            UnknownJobError: no loop has this id.
            InvalidTransitionError: it has ended already.
        """
        record = self._records.get(loop_id)
        if record.ended_at_s is not None:
            raise InvalidTransitionError(f"loop {loop_id} has ended already: {record.state}")
        await self._records.save(record.model_copy(update={"is_cancelled": True}))
        if (task := self._tasks.get(loop_id)) is not None:
            task.cancel()
            await asyncio.wait({task})
        for job in self._store.jobs():
            if job.name.startswith(loop_id) and not job.is_terminal:
                await self._jobs.cancel(job.job_id)
        await self._end(loop_id)
        return self.status(loop_id)

    async def resume(self, loop_id: str) -> LoopStatus:
        """Go on with a loop that failed or was cancelled: finished rounds and stored replies are not repeated.

        Raises:
            UnknownJobError: no loop has this id.
            InvalidTransitionError: it runs, or has succeeded.
        """
        record = self._records.get(loop_id)
        if record.state not in ("failed", "cancelled"):
            raise InvalidTransitionError(f"loop {loop_id} is {record.state}; there is nothing to resume")
        changes = {"attempt": record.attempt + 1, "is_cancelled": False, "failure": "", "ended_at_s": None}
        await self._records.save(record.model_copy(update=changes))
        self._start(loop_id)
        return self.status(loop_id)

    # ---- running ----

    def _start(self, loop_id: str) -> None:
        self._tasks[loop_id] = asyncio.create_task(self._run(loop_id), name=f"loop {loop_id}")

    async def _run(self, loop_id: str) -> None:
        try:
            await self._run_rounds(self._records.get(loop_id))
            await self._end(loop_id)
        except (PlutinoError, OSError) as error:
            await self._end(loop_id, failure=str(error))
        except Exception as error:
            logger.exception("loop %s failed", loop_id)
            await self._end(loop_id, failure=f"the coordinator failed ({type(error).__name__}: {error}); see its log")

    async def _run_rounds(self, record: LoopRecord) -> None:
        seeds = await asyncio.to_thread(_seeds, record.spec)
        folder = self._dir / record.loop_id
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        last = num_trainings(record.spec) - 1
        for number in range(last + 1):
            outcomes = self._outcomes(record)
            job = await self._train(record, seeds, number, outcomes, is_published=number == last)
            if number == last:
                return
            outcome = self._records.outcome(record.loop_id, number)
            if outcome is None:
                wrong = [row.row for row in self._report(job).rows.get(SEED, ()) if not row.is_right]
                questions = RoundQuestions(
                    self._records, record.loop_id, number, record.spec.loop, seeds, outcomes[:number]
                )
                teacher = open_teacher(
                    record.spec, name=record.loop_id, folder=folder, jobs=self._jobs, store=self._store
                )
                outcome = await questions.run(teacher, wrong)
                await self._records.put_outcome(record.loop_id, number, outcome)
            if ending_reason(outcome):
                # The same rows give the same adapter: this once to publish it.
                await self._train(record, seeds, number, self._outcomes(record)[:number], is_published=True)
                return

    async def _train(
        self,
        record: LoopRecord,
        seeds: Seeds,
        number: int,
        outcomes: list[RoundOutcome],
        *,
        is_published: bool,
    ) -> JobRecord:
        """A round's job, to its end."""
        folder = self._dir / record.loop_id
        _write(folder / "seed.jsonl", [row.json for row in seeds.rows])
        _write(folder / f"round-{number}.jsonl", round_rows(seeds, outcomes[:number], record.spec.job.training.seed))
        name = f"{record.loop_id}-{number}"
        spec = round_spec(record.spec, seeds.shape.format, folder, number, name=name, is_published=is_published)
        known = self._adapter_job(record) if is_published else self._job(record, number)
        if known is None or (known.is_terminal and known.state is not JobState.SUCCEEDED):
            key = _key(record, "adapter" if is_published else number, record.attempt)
            known = await self._jobs.submit(spec, idempotency_key=key)
        ended = await self._jobs.ended(known.job_id)
        if ended.state is not JobState.SUCCEEDED:
            raise JobError(f"the job {ended.job_id} of round {number} is {ended.state.value}: {ended.reason}")
        return ended

    # ---- reading ----

    async def _end(self, loop_id: str, *, failure: str = "") -> None:
        record = self._records.get(loop_id)
        await self._records.save(record.model_copy(update={"ended_at_s": time.time(), "failure": failure}))
        self._tasks.pop(loop_id, None)

    def _outcomes(self, record: LoopRecord) -> list[RoundOutcome]:
        found: list[RoundOutcome] = []
        while (outcome := self._records.outcome(record.loop_id, len(found))) is not None:
            found.append(outcome)
        return found

    def _submitted(self, record: LoopRecord, what: int | str) -> JobRecord | None:
        """The job that succeeded, else that of the latest attempt."""
        found: JobRecord | None = None
        for attempt in range(record.attempt + 1):
            known = self._store.submitted_as(_key(record, what, attempt))
            if known is not None and (found is None or found.state is not JobState.SUCCEEDED):
                found = self._store.job(known.job_id)
        return found

    def _adapter_job(self, record: LoopRecord) -> JobRecord | None:
        return self._submitted(record, "adapter")

    def _job(self, record: LoopRecord, number: int) -> JobRecord | None:
        is_last = number == num_trainings(record.spec) - 1
        return self._adapter_job(record) if is_last else self._submitted(record, number)

    def _report(self, job: JobRecord) -> ScoreReport:
        return ScoreReport.model_validate_json(self._store.scores(job.job_id)["after"])

    def _round_status(self, record: LoopRecord, number: int, job: JobRecord | None) -> RoundStatus:
        outcome = self._records.outcome(record.loop_id, number)
        path = self._dir / record.loop_id / f"round-{number}.jsonl"
        status = RoundStatus(number=number, num_rows=_num_lines(path))
        if job is None:
            return status
        is_trained = job.state is JobState.SUCCEEDED
        state = job.state.value if not is_trained else "asking" if record.state == "running" else "trained"
        changes: dict[str, object] = {"job_id": job.job_id, "state": state, "reason": job.reason}
        if is_trained and "after" in self._store.scores(job.job_id):
            report = self._report(job)
            held_out = report.by_task.get(HELD_OUT)
            changes |= {
                "seed_right": sum(row.is_right for row in report.rows[SEED]),
                "num_seed": len(report.rows[SEED]),
                "held_out": None if held_out is None else held_out.headline,
                "held_out_rows": 0 if held_out is None else held_out.num_rows,
            }
        is_last = number == num_trainings(record.spec) - 1
        if outcome is not None or (is_last and is_trained):
            changes["state"] = "done"
        if outcome is not None:
            changes |= {
                "asked": outcome.asked,
                "failed": outcome.failed,
                "kept": len(outcome.kept),
                "rejected": outcome.rejected,
                "reason": ending_reason(outcome),
            }
        return status.model_copy(update=changes)


def _key(record: LoopRecord, what: int | str, attempt: int) -> str:
    return f"llm2llm/{record.loop_id}/{what}/{attempt}"


def _seeds(spec: LoopSpec) -> Seeds:
    shape, rows = read_seeds(spec.job.data.sources[0])
    objective = spec.job.objective
    answers: frozenset[str] = frozenset()
    if isinstance(objective, ClassificationConfig):
        # A class that only some round has would change the head's outputs.
        answers = frozenset(objective.labels) or frozenset(row.answer for row in rows)
    elif spec.loop.known_answers:
        answers = frozenset(row.answer for row in rows)
    if not rows:
        raise ConfigError("the loop's job has no training rows to start from")
    return Seeds(shape=shape, rows=tuple(rows), answers=answers)


def _write(path: Path, lines: list[str]) -> None:
    text = "".join(f"{line}\n" for line in lines)
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return  # a job that runs reads it
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0
