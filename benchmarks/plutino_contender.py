"""Contender: plutino itself, a job on two agents, paused between its turns."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Mapping, Sequence

from benchmarks.contender import START_TIMEOUT_S, STEP_TIMEOUT_S, ContenderError, StepFigures
from benchmarks.job_watch import JobWatch
from benchmarks.stack import PlutinoStack
from plutino.errors import InvalidTransitionError, PlutinoError, UnreachableError
from plutino.events import JobEvent, JobStateChanged, StepCommitted
from plutino.job.spec import JobSpec

PARTS = ("compute", "wait", "serialise", "commit")
"""Where a worker's seconds of a step go."""


class PlutinoContender:
    """Trains by resuming its job for a turn.

    A pause stops the job between two decisions: the workers finish the step that they have and then wait. So the first
    step after a resume holds the pause and was computed before it; it is trained but not reported.
    """

    def __init__(self, name: str, stack: PlutinoStack, spec: JobSpec) -> None:
        self.name = name
        self._stack = stack
        self._spec = spec
        self._watch: JobWatch | None = None
        self._committed: list[list[StepCommitted]] = []
        self._is_paused = False

    def start(self) -> Mapping[str, object]:
        """Submit the job; it loads while its first steps are waited for."""
        try:
            job_id = self._stack.client.submit(self._spec)
        except PlutinoError as error:
            raise ContenderError(f"{self.name}: {error}") from error
        self._watch = JobWatch(self._stack.client, job_id)
        self._await(_is_running, START_TIMEOUT_S)
        return {"threads": 1, "job": self._spec.model_dump(mode="json")}

    def run_steps(self, num_steps: int) -> Sequence[StepFigures]:
        """Resume, drop the step that holds the pause, train so many steps, pause, and wait for rest."""
        assert self._watch is not None, "start comes first"
        try:
            if self._is_paused:
                self._stack.resume(self._watch.job_id)
                self._await(_is_running, STEP_TIMEOUT_S)
                self._await(_is_step, STEP_TIMEOUT_S)
            turn = [self._await(_is_step, STEP_TIMEOUT_S) for _ in range(num_steps)]
            self._stack.pause(self._watch.job_id)
        except PlutinoError as error:
            raise ContenderError(f"{self.name}: {error}") from error
        self._is_paused = True
        committed = [event for event in turn if isinstance(event, StepCommitted)]
        self._committed.append(committed)
        return [StepFigures(event.step, seconds=event.seconds, loss=event.loss) for event in committed]

    def close(self) -> None:
        """Cancel the job; the stack is its owner's to end."""
        if self._watch is None:
            return
        watch, self._watch = self._watch, None
        # It has ended by itself, or its coordinator has: then the stack's own end is enough.
        with contextlib.suppress(InvalidTransitionError, UnreachableError):
            self._stack.client.cancel(watch.job_id)
        watch.join()

    def seconds_by_stage(self, *, num_warmup_turns: int = 1) -> list[dict[str, float]]:
        """Median seconds of a measured step by stage: its parts, see :data:`PARTS`."""
        return seconds_by_stage(self._committed[num_warmup_turns:])

    def _await(self, is_wanted: Callable[[JobEvent], bool], timeout_s: float) -> JobEvent:
        assert self._watch is not None
        while (event := self._watch.next(timeout_s)) is not None:
            if is_wanted(event):
                return event
        raise ContenderError(f"{self.name}: the job ended before the measurement; give it more steps")


def seconds_by_stage(turns: Sequence[Sequence[StepCommitted]]) -> list[dict[str, float]]:
    """Median seconds of each part of a step, by stage, over turns of committed steps.

    A worker tells the commit time of a step with its next step's vote, so what comes with a turn's first step belongs
    to the step that held the pause, and is left out.
    """
    steps = [event for turn in turns for event in turn]
    later = [event for turn in turns for event in turn[1:]]
    stages = range(len(steps[0].workers))
    return [{part: _median_s(later if part == "commit" else steps, stage, part) for part in PARTS} for stage in stages]


def _median_s(steps: Sequence[StepCommitted], stage: int, part: str) -> float:
    return statistics.median(float(getattr(event.workers[stage], f"{part}_s")) for event in steps)


def _is_running(event: JobEvent) -> bool:
    return isinstance(event, JobStateChanged) and event.state == "running"


def _is_step(event: JobEvent) -> bool:
    return isinstance(event, StepCommitted)
