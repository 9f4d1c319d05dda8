"""What a real run of an objective is to ``benchmarks/objectives.py``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Figures = Mapping[str, Any]
"""What one seed of a run found, as JSON has it."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What one process is told."""

    seed: int
    threads: int
    folder: Path
    """Its own, for files on the way."""
    data: Path | None
    """Data sets that are not part of the repository."""
    is_quick: bool

    def kept(self, name: str, make: Callable[[], str]) -> str:
        """What ``make`` gives, or gave before the run was interrupted."""
        path = self.folder / f"{name}.done"
        if not path.exists():
            unfinished = path.with_suffix(".tmp")
            unfinished.write_text(make(), encoding="utf-8")
            unfinished.replace(path)
        return path.read_text(encoding="utf-8")

    def few(self, whole: int, quick: int) -> int:
        """A number of rows or steps: all, or as many as show that the run works."""
        return quick if self.is_quick else whole


@dataclass(frozen=True, slots=True)
class Run:
    """A run: what one seed does, and what its seeds prove together."""

    run: Callable[[Settings], Figures]
    judge: Callable[[Sequence[Figures]], tuple[str, bool]]
    """The goal with the measured values, and whether it is reached."""
    needs_data: bool = False
    """Whether it reads data sets that are not part of the repository."""
