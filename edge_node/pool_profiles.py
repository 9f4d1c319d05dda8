"""What a device was asked to measure: answered from what was kept, or by a worker, and kept for later jobs."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from edge_node.pool_config import PoolConfig, Readiness
from edge_node.pool_reports import PoolReports
from edge_node.pooled_worker import AskedProfile, PooledWorker
from edge_node.processors import processor_quota, processors_of
from edge_node.profile_book import ProfileBook
from edge_node.state_dir import StateDir


class PoolProfiles:
    """The measurements of one device.

    Args:
        config: of the pool.
        state_dir: where results are kept.
        reports: take the answers.
        readiness: gives what the first worker told; called once a measurement is asked for.
    """

    def __init__(
        self, config: PoolConfig, state_dir: StateDir, reports: PoolReports, readiness: Callable[[], Readiness]
    ) -> None:
        self._config = config
        self._state_dir = state_dir
        self._reports = reports
        self._readiness = readiness
        self._book: ProfileBook | None = None

    def answer_kept(self, request_id: str, request: dict[str, Any]) -> bool:
        """Report what was kept for such a request; False: it must be measured."""
        kept = self._opened_book().find(request)
        if kept is not None:
            self._reports.profile(request_id, timings_json=json.dumps(kept), is_kept=True)
        return kept is not None

    def ask(self, worker: PooledWorker, request_id: str, request: dict[str, Any], *, is_undisturbed: bool) -> None:
        """Let a worker measure."""
        worker.profiles.append(AskedProfile(request_id, request, is_undisturbed=is_undisturbed))
        worker.process.send({"profile": request})

    def take(self, asked: AskedProfile, result: dict[str, Any], *, is_undisturbed: bool) -> None:
        """Report what a worker measured, or why it could not."""
        if "timings" not in result:
            self._reports.profile(asked.request_id, error=str(result["error"]))
            return
        timings, lacked_company = result["timings"], bool(result.get("lacked_company"))
        # Beside a job's worker everything takes longer; the next job may find the device idle. And without a neighbour
        # that computes it takes less than was asked for.
        if asked.is_undisturbed and is_undisturbed and not lacked_company:
            self._opened_book().keep(asked.request, timings)
        self._reports.profile(asked.request_id, timings_json=json.dumps(timings), lacked_company=lacked_company)

    def _opened_book(self) -> ProfileBook:
        if self._book is None:
            told, config = self._readiness(), self._config
            machine = {
                "versions": told.versions,
                "arithmetic": told.hardware.arithmetic,
                "device": config.device,
                "processors": processors_of(config.device),
                "processor_quota": processor_quota(),
            }
            self._book = ProfileBook(self._state_dir.path / "profiles.json", machine)
        return self._book
