"""The engine without Ray: rounds and runners are threads of the coordinator's own process."""

from __future__ import annotations

import asyncio
import logging
import threading
from pathlib import Path

from coordinator.jobs.runner import Verify
from coordinator.jobs.runner_stream import run_job_runner
from coordinator.scheduling.round import solve
from plutino.types import JobId

logger = logging.getLogger(__name__)


class LocalEngine:
    """Runs the same code as the Ray engine, in threads."""

    def __init__(
        self,
        *,
        address: str,
        bulk_address: str,
        incarnation: int,
        verify: Verify | None = None,
        runner_identity: Path | None = None,
    ) -> None:
        self._runner_identity = runner_identity
        self._address = address
        self._bulk_address = bulk_address
        self._incarnation = incarnation
        self._verify = verify
        self._runners: dict[JobId, threading.Thread] = {}

    async def start(self) -> None:
        """Nothing to start."""

    async def solve(self, round_json: str) -> str:
        """See :class:`coordinator.scheduling.engine.Engine`."""
        return await asyncio.to_thread(solve, round_json)

    def start_runner(self, job_id: JobId) -> None:
        """See :class:`coordinator.scheduling.engine.Engine`."""
        known = self._runners.get(job_id)
        if known is not None and known.is_alive():
            return
        arguments = (
            *(self._address, self._bulk_address, job_id, self._incarnation),
            *(self._verify, self._runner_identity),
        )
        thread = threading.Thread(target=run_job_runner, args=arguments, name=f"runner {job_id}", daemon=True)
        self._runners[job_id] = thread
        thread.start()

    def stop_runner(self, job_id: JobId) -> None:
        """The runner ends with its stream, which the coordinator has ended."""
        self._runners.pop(job_id, None)

    async def close(self) -> None:
        """Wait, within a bound, for runners whose streams have ended."""
        for thread in self._runners.values():
            await asyncio.to_thread(thread.join, 5.0)
