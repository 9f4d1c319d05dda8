"""Ground rules of the whole suite, and the account of where its seconds go.

No test reaches the network or the state of whoever runs the suite. The account is printed before pytest's own last
line; a part over its budget is marked but never fails, because a busy machine is not a fault of the code.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

# Read when huggingface_hub and tokenizers are imported, thus before any test module is; children inherit them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

TESTS_DIR = Path(__file__).resolve().parent


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the suite with the seconds it may take on two cores."""

    name: str
    budget_s: float


# A marker says more about a test's cost than its directory.
PART_BY_MARKER = {
    "chaos": Part("chaos", 900),
    "gpu": Part("gpu", 300),
    "slow": Part("slow", 900),
    "ray": Part("ray", 60),
}
PART_BY_DIRECTORY = {
    "unit": Part("unit", 60),
    "numerics": Part("numerics", 90),
    "integration": Part("integration", 60),
    "e2e": Part("spine (e2e)", 150),
    "chaos": PART_BY_MARKER["chaos"],
}
OTHER = Part("other", 10)


def part_of(path: Path, markers: set[str]) -> Part:
    """Which part's account a test's seconds go to."""
    for marker, part in PART_BY_MARKER.items():
        if marker in markers:
            return part
    directories = path.relative_to(TESTS_DIR).parts if path.is_relative_to(TESTS_DIR) else ()
    return PART_BY_DIRECTORY.get(directories[0], OTHER) if directories else OTHER


class SecondsByPart:
    """Pytest plugin: sums set-up, call and teardown of every test by part."""

    def __init__(self) -> None:
        self._part_by_test: dict[str, Part] = {}
        self._seconds: dict[Part, float] = {}
        self._tests: dict[Part, set[str]] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            self._part_by_test[item.nodeid] = part_of(item.path, {marker.name for marker in item.iter_markers()})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        part = self._part_by_test.get(report.nodeid, OTHER)
        self._seconds[part] = self._seconds.get(part, 0.0) + report.duration
        self._tests.setdefault(part, set()).add(report.nodeid)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self._seconds:
            return
        terminalreporter.section("seconds by part")
        for part in sorted(self._seconds, key=lambda part: -self._seconds[part]):
            seconds = self._seconds[part]
            mark = "  over budget" if seconds > part.budget_s else ""
            terminalreporter.write_line(
                f"{part.name:<12} {len(self._tests[part]):>5} tests {seconds:>7.1f} s of {part.budget_s:>4.0f} s{mark}"
            )


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(SecondsByPart(), "seconds-by-part")


@pytest.fixture(autouse=True, scope="session")
def _own_state_and_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the state and the weights cache of whoever runs the suite out of it, children included."""
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("XDG_STATE_HOME", "XDG_CACHE_HOME"):
            patch.setenv(variable, str(tmp_path_factory.mktemp(variable.lower())))
        yield
