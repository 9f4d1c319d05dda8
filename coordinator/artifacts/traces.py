"""Recorded steps on disk, with what was predicted of them. They decide nothing: a lost file is a picture less.

Layout below the state directory::

    jobs/<job_id>/traces/<plan_epoch>.plan.json         the plan and the problem that it was made from
    jobs/<job_id>/traces/<plan_epoch>.<step>.json       what all workers recorded of a step
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from coordinator.artifacts.shadows import check_name
from coordinator.scheduling.problem import PlanningProblem
from partitioner.plan import Plan
from partitioner.trace import StepTrace
from partitioner.values import PlanValue
from plutino.errors import UnknownJobError

KEPT_STEPS = 8
"""Of a job: its first recorded step, and the newest ones."""

_STEP_NAME = re.compile(r"(\d+)\.(\d+)\.json", re.ASCII)


class PlannedEpoch(PlanValue):
    """A plan epoch as it was planned."""

    plan: Plan
    problem: PlanningProblem


class TraceStore:
    """The recorded steps of all jobs below one state directory."""

    def __init__(self, state_dir: Path) -> None:
        self._state_dir = state_dir

    def put_plan(self, job_id: str, plan_epoch: int, planned: PlannedEpoch) -> None:
        """Keep what was predicted of a plan epoch."""
        _write(self._folder(job_id) / f"{plan_epoch}.plan.json", planned.model_dump_json())

    def planned(self, job_id: str, plan_epoch: int) -> PlannedEpoch | None:
        """What was predicted of a plan epoch, if that is known."""
        path = self._folder(job_id) / f"{plan_epoch}.plan.json"
        return PlannedEpoch.model_validate_json(path.read_bytes()) if path.is_file() else None

    def put_step(self, job_id: str, trace: StepTrace) -> None:
        """Keep a recorded step; the job's oldest ones but the first give way, and plans that no step needs."""
        folder = self._folder(job_id)
        _write(folder / f"{trace.plan_epoch}.{trace.step}.json", trace.model_dump_json())
        recorded = self._recorded(job_id)
        for epoch, step in recorded[1 : 1 - KEPT_STEPS]:
            (folder / f"{epoch}.{step}.json").unlink(missing_ok=True)
        needed = {epoch for epoch, _ in self._recorded(job_id)}
        for path in folder.glob("*.plan.json"):
            if int(path.name.split(".")[0]) < trace.plan_epoch and int(path.name.split(".")[0]) not in needed:
                path.unlink(missing_ok=True)

    def steps(self, job_id: str) -> tuple[int, ...]:
        """Recorded steps, oldest plan epoch first."""
        return tuple(step for _, step in self._recorded(job_id))

    def step(self, job_id: str, step: int | None) -> tuple[StepTrace, PlannedEpoch | None]:
        """A recorded step and what was predicted of its plan epoch, if that is known.

        Args:
            job_id: the job.
            step: which step; None: the newest one.

        Raises:
            UnknownJobError: no such step was recorded.
        """
        recorded = self._recorded(job_id)
        found = next((pair for pair in reversed(recorded) if step is None or pair[1] == step), None)
        if found is None:
            known = ", ".join(str(s) for _, s in recorded)
            raise UnknownJobError(
                f"step {step} of job {job_id} was not recorded; recorded are: {known}"
                if known
                else f"no step of job {job_id} is recorded yet: the third of each plan is, and every 64th after it"
            )
        folder, (epoch, number) = self._folder(job_id), found
        trace = StepTrace.model_validate_json((folder / f"{epoch}.{number}.json").read_bytes())
        return trace, self.planned(job_id, epoch)

    def _recorded(self, job_id: str) -> list[tuple[int, int]]:
        folder = self._folder(job_id)
        if not folder.is_dir():
            return []
        matches = (_STEP_NAME.fullmatch(path.name) for path in folder.iterdir())
        return sorted((int(match[1]), int(match[2])) for match in matches if match)

    def _folder(self, job_id: str) -> Path:
        return self._state_dir / "jobs" / check_name("job id", job_id) / "traces"


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
