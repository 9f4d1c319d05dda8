"""A teacher that is a larger model, split over the devices of the job: its answers are a job's held-out answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from coordinator.jobs.manager import JobManager
from coordinator.jobs.record import JobState
from coordinator.jobs.scoring import ScoreReport
from coordinator.llm2llm.teachers.base import Ask, Reply, Take
from coordinator.storage.base import Store
from plutino.errors import JobError
from plutino.job.spec import JobSpec, parse_spec
from plutino.llm2llm import PipelineTeacher


class PipelineModel:
    """Implements :class:`coordinator.llm2llm.teachers.base.TeacherHandle`.

    Args:
        config: the model.
        student: the loop's job: the teacher may use the same devices.
        name: the loop's id.
        folder: where questions are written.
        jobs: runs the teacher's jobs.
        store: has their answers.
    """

    def __init__(
        self, config: PipelineTeacher, student: JobSpec, *, name: str, folder: Path, jobs: JobManager, store: Store
    ) -> None:
        self._config = config
        self._student = student
        self._name = name
        self._folder = folder
        self._jobs = jobs
        self._store = store

    async def answer(self, asks: Sequence[Ask], take: Take) -> None:
        """See :class:`coordinator.llm2llm.teachers.base.TeacherHandle`.

        Raises:
            JobError: the teacher's job did not succeed.
        """
        rows = [{"prompt": "\n\n".join(t.content for t in ask.turns), "completion": "-"} for ask in asks]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        digest = hashlib.sha256("\n".join(ask.key for ask in asks).encode() + text.encode()).hexdigest()[:16]
        path = self._folder / f"questions-{digest}.jsonl"
        path.write_text(text, encoding="utf-8")
        # The same questions are the same job: a coordinator that restarts asks no devices twice.
        job = await self._jobs.submit(self._spec(path), idempotency_key=f"llm2llm/{self._name}/ask/{digest}")
        ended = await self._jobs.ended(job.job_id)
        if ended.state is not JobState.SUCCEEDED:
            raise JobError(f"the teacher's job {job.job_id} is {ended.state.value}: {ended.reason}")
        report = ScoreReport.model_validate_json(self._store.scores(job.job_id)["before"])
        answered = {row.row: row.answer for row in report.rows["rows"]}
        for number, ask in enumerate(asks):
            await take(ask, Reply(answered[number]))

    def _spec(self, path: Path) -> JobSpec:
        """A job that lets the base model answer. A job trains, so it does one step on one question, which is lost."""
        return parse_spec(
            {
                "name": f"{self._name}-teacher",
                "model": self._config.model.model_dump(),
                "method": {"type": "lora", "rank": 1},
                "data": {"train": str(path), "eval": str(path), "limit": 1, "max_tokens": self._config.max_tokens},
                "scoring": {
                    "metric": "exact_match",
                    "max_new_tokens": self._config.max_new_tokens,
                    "temperature": self._config.temperature,
                    "after": False,
                    "keep_answers": True,
                },
                "evaluation": {"measure_general": "never"},
                "training": {"steps": 1, "batch_size": 1, "seed": self._student.training.seed},
                "placement": self._student.placement.model_dump(),
                "output": {"publish": False},
            },
            base_dir=path.parent,
        )
