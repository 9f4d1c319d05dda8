"""Measures contenders in turns and keeps every figure.

A shared machine drifts by more than most differences worth knowing. So contenders take short turns one after the
other, in an order that is reversed every round, and each one's even turns are compared with its own odd ones: that
ratio (A/A) is what this machine shows for no difference at all.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sqlite3
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.contender import Contender, ContenderError, StepFigures

RESULTS_DIR = Path(__file__).resolve().parent / "results"
MIN_TURNS = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Turns:
    """How a measurement is laid out."""

    num_turns: int = 8
    """Measured turns of each contender."""
    steps_per_turn: int = 2
    warmup_steps: int = 3
    """Steps of each contender before the first measured turn."""

    def __post_init__(self) -> None:
        """Refuse what would give medians nobody should quote."""
        if self.num_turns < MIN_TURNS or self.steps_per_turn < 1 or self.warmup_steps < 1:
            raise ValueError(
                f"{self.num_turns} turns of {self.steps_per_turn} steps after {self.warmup_steps} warm-up steps give "
                f"no figure worth quoting; take at least {MIN_TURNS} turns of 1 step after 1 warm-up step"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What one contender showed."""

    name: str
    turns: tuple[tuple[StepFigures, ...], ...]
    """Every measured step, by turn."""
    facts: Mapping[str, object]

    @property
    def median_step_s(self) -> float:
        """Median wall seconds of a step over all turns."""
        return _median_step_s(self.turns)

    @property
    def a_a_ratio(self) -> float:
        """Median of the even turns over that of the odd turns: 1 on a machine without noise."""
        return _median_step_s(self.turns[0::2]) / _median_step_s(self.turns[1::2])

    @property
    def losses(self) -> dict[int, float]:
        """Loss by step number."""
        return {figures.step: figures.loss for turn in self.turns for figures in turn}


def _median_step_s(turns: Iterable[Sequence[StepFigures]]) -> float:
    return statistics.median(figures.seconds for turn in turns for figures in turn)


def measure_in_turns(
    contenders: Sequence[Contender], turns: Turns, *, report: Callable[[str], None] = print
) -> list[Figures]:
    """Start all contenders, let each warm up, then let them take turns; ends them whatever happens.

    Args:
        contenders: In the order of the first turn.
        turns: How many and how long.
        report: Told how far the measurement is, a line at a time.

    Raises:
        ContenderError: one of them does not start, dies or does not answer in time.
    """
    try:
        facts = []
        for contender in contenders:
            facts.append(contender.start())
            contender.run_steps(turns.warmup_steps)
            report(f"{contender.name}: warm")
        measured: list[list[tuple[StepFigures, ...]]] = [[] for _ in contenders]
        for turn in range(turns.num_turns):
            order = range(len(contenders)) if turn % 2 == 0 else reversed(range(len(contenders)))
            for index in order:
                measured[index].append(tuple(contenders[index].run_steps(turns.steps_per_turn)))
            report(f"turn {turn + 1} of {turns.num_turns}")
    finally:
        for contender in contenders:
            contender.close()
    return [
        Figures(name=contender.name, turns=tuple(steps), facts=fact)
        for contender, steps, fact in zip(contenders, measured, facts, strict=True)
    ]


def largest_loss_difference(figures: Sequence[Figures]) -> float:
    """How far apart the contenders' losses of the same step are at most: do they train the same thing?

    Compares the steps that all of them measured.

    Raises:
        ContenderError: there is no such step.
    """
    by_step = [each.losses for each in figures]
    common = set(by_step[0]).intersection(*by_step[1:])
    if not common:
        names = ", ".join(each.name for each in figures)
        raise ContenderError(f"no step was measured of all of {names}, so their losses cannot be compared; take more")
    return max(max(at_step) - min(at_step) for at_step in ([each[step] for each in by_step] for step in common))


def table(figures: Sequence[Figures], *, tokens_per_step: int) -> str:
    """Plain text: a line a contender, its ratio taken to the fastest one."""
    fastest_s = min(each.median_step_s for each in figures)
    lines = [f"{'contender':<28} {'s/step':>8} {'tokens/s':>9} {'ratio':>6} {'A/A':>6}"]
    lines += [
        f"{each.name:<28} {each.median_step_s:>8.3f} {tokens_per_step / each.median_step_s:>9.0f} "
        f"{each.median_step_s / fastest_s:>6.2f} {each.a_a_ratio:>6.2f}"
        for each in sorted(figures, key=lambda each: each.median_step_s)
    ]
    return "\n".join(lines)


def median_sync_s(path: Path, *, num_transactions: int = 50) -> float:
    """Seconds of a transaction of one row, as the coordinator's store makes them, in a new database at ``path``."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("CREATE TABLE rows (number INTEGER)")
        seconds = []
        for number in range(num_transactions):
            started_s = time.perf_counter()
            connection.execute("INSERT INTO rows VALUES (?)", (number,))
            seconds.append(time.perf_counter() - started_s)
    return statistics.median(seconds)


def machine_facts(packages: Iterable[str]) -> dict[str, object]:
    """Date, processor and versions, to be kept with the figures."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "num_cpus": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in packages},
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    # ARM kernels name no model there.
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def figures_document(
    figures: Sequence[Figures], *, workload: Mapping[str, object], machine: Mapping[str, object], turns: Turns
) -> dict[str, object]:
    """All figures as values for JSON."""
    return {
        "machine": machine,
        "workload": workload,
        "turns": asdict(turns),
        "contenders": {
            each.name: {
                "median_step_s": each.median_step_s,
                "a_a_ratio": each.a_a_ratio,
                "facts": each.facts,
                "turns": [[asdict(step) for step in turn] for turn in each.turns],
            }
            for each in figures
        },
    }


def write_results(path: Path, document: Mapping[str, object]) -> None:
    """Write a document as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(document, indent=1) + "\n")
    unfinished.replace(path)
