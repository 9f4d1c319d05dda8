"""Holds a job between two steps, so that what a test does meanwhile comes neither too early nor too late."""

from __future__ import annotations

import math
import threading

import pytest

from edge_node.engine.executor import StageExecutor
from edge_node.engine.unit import StepOutcome, UnitInput
from tests.integration.stack import WAIT_S


class StepGate:
    """Workers that are threads of this process begin no training step that is shut; at first all are open."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._changed = threading.Condition()
        self._end = math.inf
        train_step = StageExecutor.train_step

        def train_step_once_open(executor: StageExecutor, work: UnitInput) -> StepOutcome:
            with self._changed:
                assert self._changed.wait_for(lambda: work.unit.serial < self._end, WAIT_S), f"{work.unit} stayed shut"
            return train_step(executor, work)

        monkeypatch.setattr(StageExecutor, "train_step", train_step_once_open)

    def hold_at(self, step: int) -> None:
        """Steps below this one may begin: the job comes to ``step`` steps done and no further."""
        self._set(step)

    def open(self) -> None:
        """Every step may begin."""
        self._set(math.inf)

    def _set(self, end: float) -> None:
        with self._changed:
            self._end = end
            self._changed.notify_all()
