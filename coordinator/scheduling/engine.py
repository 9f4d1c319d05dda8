"""The seam between the coordinator and whatever does its heavy work: Ray, or this very process."""

from __future__ import annotations

from typing import Protocol

from plutino.types import JobId


class Engine(Protocol):
    """Runs scheduling rounds and jobs' runners. Nothing it holds is true: all of it is rebuilt from the store."""

    async def start(self) -> None:
        """Be ready for the other calls."""

    async def solve(self, round_json: str) -> str:
        """Decide a round of scheduling (:func:`coordinator.scheduling.round.solve`), wherever that runs."""

    def start_runner(self, job_id: JobId) -> None:
        """Let a runner of this job exist; harmless if one does."""

    def stop_runner(self, job_id: JobId) -> None:
        """Let no runner of this job exist; harmless if none does."""

    async def close(self) -> None:
        """End everything that was started."""
