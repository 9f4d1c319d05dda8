"""A failed test shows what the processes that it started have logged meanwhile: the ends of those logs."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import pytest

NUM_SHOWN = 6
SHOWN_BYTES = 4000


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add the ends of logs to the report of a phase that failed, running out of time included."""
    report = yield
    if report.failed:
        folder: Path = item.config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined]
        report.sections += [(str(path), end_of(path)) for path in logs_below(folder, call.start)]
    return report


def logs_below(folder: Path, since_s: float) -> list[Path]:
    """Log files that were written to at that time or later, the newest first."""
    times = {path: path.stat().st_mtime for path in folder.rglob("*.log") if path.is_file()}
    written = [path for path, time_s in times.items() if time_s >= since_s]
    return sorted(written, key=lambda path: -times[path])[:NUM_SHOWN]


def end_of(path: Path) -> str:
    """The end of a log."""
    return path.read_bytes()[-SHOWN_BYTES:].decode(errors="replace")
