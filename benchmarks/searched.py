"""Trainings in processes of their own, many at a time: learning rates first, then seeds at the best of each row's.

:class:`Searched` is what benchmarks of methods have in common. What lies in its folder already is not trained again,
and its tables are written anew whenever a training ends.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from benchmarks.method_rows import Cell
from plutino.job.spec import JobSpec

TIMEOUT_S = 3 * 3600.0


class Searched(ABC):
    """All trainings of a call.

    Args:
        out: folder of results.
        num_at_a_time: trainings beside each other.
        threads: of each.
        table_file: name in that folder of what :meth:`write` writes for people.
        time_limit_s: no training begins later than this.
    """

    def __init__(
        self, out: Path, *, num_at_a_time: int, threads: int, table_file: str, time_limit_s: float = math.inf
    ) -> None:
        self._out = out.resolve()
        self._num_at_a_time = num_at_a_time
        self._threads = threads
        self._table_file = table_file
        self._time_limit_s = time_limit_s
        self.failed: dict[str, str] = {}
        """Training -> why it came to nothing."""
        self._locks: dict[str, threading.Lock] = defaultdict(threading.Lock)
        """By training: two tables may want the same one."""

    @property
    @abstractmethod
    def num_groups(self) -> int:
        """Tables."""

    @abstractmethod
    def searches(self, group: int) -> Iterable[Cell]:
        """Trainings of a table by which learning rates are chosen."""

    @abstractmethod
    def finals(self, group: int, name: str, rate: float) -> Iterable[Cell]:
        """Trainings of one row of a table at its learning rate."""

    @abstractmethod
    def spec(self, cell: Cell) -> JobSpec:
        """What is trained."""

    @abstractmethod
    def command(self, cell: Cell) -> Sequence[str]:
        """Module that trains it, with what stands before the files of spec and result."""

    @abstractmethod
    def badness(self, figures: Mapping[str, Any]) -> float:
        """Of a search's result: the learning rate with the least is taken. What is not finite is never taken."""

    @abstractmethod
    def write(self) -> None:
        """The tables as far as they have come."""

    def environments(self, cell: Cell) -> Sequence[Mapping[str, str]]:
        """What a training's process has in its environment beside ours; what fails with one is tried with the next."""
        # The processor alone: trainings run side by side, and cards would be shared.
        return ({"CUDA_VISIBLE_DEVICES": ""},)

    def run(self) -> int:
        """Train everything; 0 if nothing failed."""
        started_s = time.monotonic()
        waiting = sorted(cell for group in range(self.num_groups) for cell in self.searches(group))
        chosen: set[tuple[int, str]] = set()
        running: dict[Future[None], Cell] = {}
        num_done = 0
        with ThreadPoolExecutor(self._num_at_a_time) as pool:
            while waiting or running:
                if time.monotonic() - started_s > self._time_limit_s and waiting:
                    print(f"{len(waiting)} trainings are left out for lack of time", file=sys.stderr, flush=True)
                    waiting = []
                while waiting and len(running) < self._num_at_a_time:
                    cell = waiting.pop(0)
                    running[pool.submit(self._train, cell)] = cell
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    cell = running.pop(future)
                    future.result()
                    num_done += 1
                    key = (cell.group, cell.row)
                    if key not in chosen and (rate := self.best_rate(cell.group, cell.row)) is not None:
                        chosen.add(key)
                        waiting = sorted([*waiting, *self.finals(cell.group, cell.row, rate)])
                    print(f"{time.monotonic() - started_s:7.0f} s  {num_done} done  {cell.name}", flush=True)
                    self.write()
        for name, reason in self.failed.items():
            print(f"FAILED {name}: {reason}", file=sys.stderr)
        print((self._out / self._table_file).read_text(encoding="utf-8"))
        return 1 if self.failed else 0

    def best_rate(self, group: int, name: str) -> float | None:
        """The learning rate that did best on what was kept back; None while one of them is missing."""
        cells = [cell for cell in self.searches(group) if cell.row == name]
        if any(self.read(cell) is None and cell.name not in self.failed for cell in cells):
            return None
        found = {cell.rate: self.badness(figures) for cell in cells if (figures := self.read(cell)) is not None}
        finite = {rate: badness for rate, badness in found.items() if math.isfinite(badness)}
        return min(finite, key=lambda rate: finite[rate]) if finite else None

    def read(self, cell: Cell) -> dict[str, Any] | None:
        """What a training measured; None: it has not ended well, or not yet."""
        try:
            figures: dict[str, Any] = json.loads(self._file(cell).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return figures

    def _file(self, cell: Cell) -> Path:
        return self._out / f"{cell.name}.json"

    def _train(self, cell: Cell) -> None:
        with self._locks[cell.name]:
            for environment in self.environments(cell):
                if self.read(cell) is None:
                    self._try(cell, environment)

    def _try(self, cell: Cell, environment: Mapping[str, str]) -> None:
        spec_file = self._out / f"{cell.name}.spec.json"
        spec_file.write_text(self.spec(cell).model_dump_json(), encoding="utf-8")
        try:
            ended = subprocess.run(
                [sys.executable, "-m", *self.command(cell), str(spec_file), str(self._file(cell))],
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": str(self._threads),
                    "HF_HUB_OFFLINE": "1",
                    "TOKENIZERS_PARALLELISM": "false",
                    **environment,
                },
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=TIMEOUT_S,
            )
        except subprocess.TimeoutExpired:
            self.failed[cell.name] = f"no end within {TIMEOUT_S:.0f} s"
            return
        finally:
            spec_file.unlink()
        if ended.returncode == 0:
            self.failed.pop(cell.name, None)
        else:
            self.failed[cell.name] = (ended.stderr.strip().splitlines() or ["no message"])[-1]
            print(f"{cell.name}: {self.failed[cell.name]}", file=sys.stderr, flush=True)
