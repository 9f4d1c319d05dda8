"""Ground rules of the whole suite, and the account of where its seconds go.

No test reaches the network or the state of whoever runs the suite. The account is printed before pytest's own last
line: seconds of the clock against the budget, which holds for two quiet cores, and processor seconds, which a busy
machine changes little. Where processes share the tests (pytest-xdist), each second of one of them is its share of a
second of the run's clock. A part over its budget is marked but never fails, because a busy machine is not a fault of
the code.
"""

from __future__ import annotations

import gc
import os
import resource
import signal
import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest_plugins = ["tests.logs_of_failures", "pytester"]

# Read when huggingface_hub and tokenizers are imported, thus before any test module is; children inherit them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# A shell starts background jobs with SIGINT ignored, which every child inherits: Ctrl-C would be pressed in vain.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

TESTS_DIR = Path(__file__).resolve().parent


_OUTPUT_KEY = "seconds_by_part"


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the suite with the seconds it may take on two cores."""

    name: str
    budget_s: float


SPINE = Part("spine", 150)
ANY_MODEL = Part("any model", 80)
QUANTISED = Part("quantised", 40)
PLANNER_AND_RAY = Part("planner and Ray", 60)
PAC = Part("PAC", 70)
METHODS = Part("methods", 70)
OBJECTIVES = Part("objectives", 70)

# A marker says more about a test's cost than its file.
PART_BY_MARKER = {
    "chaos": Part("chaos", 900),
    "gpu": Part("gpu", 300),
    "slow": Part("slow", 1800),
    "ray": PLANNER_AND_RAY,
}
# Beginnings of paths below tests/; the longest that fits wins, and what fits none is the spine's.
PART_BY_PATH = {
    # Families, weights over the wire, security, machines of all kinds.
    "numerics/test_famil": ANY_MODEL,
    "numerics/test_kernel_probe": ANY_MODEL,
    "unit/edge/test_cache": ANY_MODEL,
    "unit/deploy/": ANY_MODEL,
    "unit/doctor/": ANY_MODEL,
    "unit/edge/test_hardware": ANY_MODEL,
    "unit/edge/test_weights": ANY_MODEL,
    "unit/job/test_hub_id": ANY_MODEL,
    "unit/jobs/test_eligibility": ANY_MODEL,
    "unit/security/": ANY_MODEL,
    "unit/sources/": ANY_MODEL,
    "unit/test_manifest": ANY_MODEL,
    "unit/weights/": ANY_MODEL,
    "unit/wire/test_chunks": ANY_MODEL,
    "integration/test_doctor": ANY_MODEL,
    "integration/test_hub": ANY_MODEL,
    "integration/test_mixed_machines": ANY_MODEL,
    "integration/test_ordinary_user": ANY_MODEL,
    "integration/test_security": ANY_MODEL,
    "integration/test_weights": ANY_MODEL,
    "e2e/test_security": ANY_MODEL,
    "lan/": ANY_MODEL,
    # Quantised layers.
    "numerics/test_gptq": QUANTISED,
    "numerics/test_lora_linear": QUANTISED,
    "numerics/test_packed": QUANTISED,
    "numerics/test_quant": QUANTISED,
    "unit/quantize/": QUANTISED,
    "unit/test_gptq": QUANTISED,
    "unit/partitioner/test_packed": QUANTISED,
    "integration/test_quant": QUANTISED,
    # The planner; Ray has its marker.
    "numerics/test_planner": PLANNER_AND_RAY,
    "numerics/test_product_growth": PLANNER_AND_RAY,
    "numerics/test_recompute_peak": PLANNER_AND_RAY,
    "unit/partitioner/": PLANNER_AND_RAY,
    "unit/scheduling/": PLANNER_AND_RAY,
    # Encoders, parallel adapters, activation cache, data-parallel epochs.
    "numerics/test_encoder": PAC,
    "integration/test_encoder": PAC,
    "numerics/test_frozen_prefix_halves": PAC,
    "numerics/test_pac": PAC,
    "integration/test_pac": PAC,
    "unit/benchmarks/test_pac_ray_train": PAC,
    "unit/activation_cache/": PAC,
    # Methods beside LoRA; objectives beside supervised tuning.
    "numerics/test_methods": METHODS,
    "unit/sweeps/": METHODS,
    "integration/test_methods": METHODS,
    "integration/test_kept_profiles": PLANNER_AND_RAY,
    "integration/test_leaving": PLANNER_AND_RAY,
    "integration/test_moving": PLANNER_AND_RAY,
    "integration/test_replicas": PLANNER_AND_RAY,
    "integration/test_step_traces": PLANNER_AND_RAY,
    "unit/jobs/test_kept_numerics": PLANNER_AND_RAY,
    "unit/jobs/test_measuring": PLANNER_AND_RAY,
    "unit/jobs/test_replanning": PLANNER_AND_RAY,
    "unit/jobs/test_tracing": PLANNER_AND_RAY,
    "unit/edge/test_card_memory": PLANNER_AND_RAY,
    "unit/edge/test_failed_allocation": PLANNER_AND_RAY,
    "unit/edge/test_meeting": PLANNER_AND_RAY,
    "unit/edge/test_profile_book": PLANNER_AND_RAY,
    "unit/jobs/test_profiler": PLANNER_AND_RAY,
    "unit/fleet/test_cores": PLANNER_AND_RAY,
    "unit/engine/test_neighbours": PLANNER_AND_RAY,
    "numerics/test_objectives": OBJECTIVES,
    "unit/objectives/": OBJECTIVES,
    "unit/llm2llm/": OBJECTIVES,
    "unit/data/test_formats": OBJECTIVES,
    "unit/data/test_mixture": OBJECTIVES,
    "unit/data/test_packing": OBJECTIVES,
    "unit/data/test_preview": OBJECTIVES,
    "unit/data/test_uses": OBJECTIVES,
    "unit/data/test_tokens_elsewhere": OBJECTIVES,
    "unit/test_examples": OBJECTIVES,
    "integration/test_objectives": OBJECTIVES,
    "unit/jobs/test_rewards": OBJECTIVES,
    "unit/jobs/test_value_scores": OBJECTIVES,
}


def part_of(path: Path, markers: set[str]) -> Part:
    """Which part's account a test's seconds go to."""
    for marker, part in PART_BY_MARKER.items():
        if marker in markers:
            return part
    below = path.relative_to(TESTS_DIR).as_posix() if path.is_relative_to(TESTS_DIR) else ""
    beginnings = [beginning for beginning in PART_BY_PATH if below.startswith(beginning)]
    return PART_BY_PATH[max(beginnings, key=len)] if beginnings else SPINE


def processor_s() -> float:
    """Seconds that this process and its reaped children have computed."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


@dataclass(slots=True)
class Account:
    """What a part, or a folder of it, has taken."""

    num_tests: int = 0
    clock_s: float = 0.0
    processor_s: float = 0.0


class SecondsByPart:
    """Pytest plugin: sums set-up, call and teardown of every test by part, and by folder within it.

    A fixture counts where it is set up or torn down; a child process counts for processor time where it is reaped.
    """

    def __init__(self) -> None:
        self._accounts: dict[Part, dict[str, Account]] = {}
        self._num_processes = 1

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        clock_s, used_s = time.monotonic(), processor_s()
        result = yield
        part = part_of(item.path, {marker.name for marker in item.iter_markers()})
        folder = item.path.relative_to(TESTS_DIR).parts[0] if item.path.is_relative_to(TESTS_DIR) else "."
        account = self._accounts.setdefault(part, {}).setdefault(folder, Account())
        account.num_tests += 1
        account.clock_s += time.monotonic() - clock_s
        account.processor_s += processor_s() - used_s
        return result

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """A process among several hands its accounts to the one that prints."""
        output: dict[str, object] | None = getattr(session.config, "workeroutput", None)
        if output is not None:
            output[_OUTPUT_KEY] = [
                (part.name, part.budget_s, folder, account.num_tests, account.clock_s, account.processor_s)
                for part, accounts in self._accounts.items()
                for folder, account in accounts.items()
            ]

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Add what one of several processes has taken; one that crashed has told nothing."""
        self._num_processes = max(self._num_processes, int(node.workerinput["workercount"]))
        for name, budget_s, folder, num_tests, clock_s, used_s in getattr(node, "workeroutput", {}).get(
            _OUTPUT_KEY, ()
        ):
            account = self._accounts.setdefault(Part(name, budget_s), {}).setdefault(folder, Account())
            account.num_tests += num_tests
            account.clock_s += clock_s / self._num_processes
            account.processor_s += used_s

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self._accounts:
            return
        terminalreporter.section("seconds by part")
        for part, accounts in sorted(self._accounts.items(), key=lambda entry: -_sum(entry[1]).clock_s):
            whole = _sum(accounts)
            mark = "  over budget" if whole.clock_s > part.budget_s else ""
            terminalreporter.write_line(f"{_row(part.name, whole)} of {part.budget_s:>4.0f} s{mark}")
            if len(accounts) > 1:
                for folder in sorted(accounts):
                    terminalreporter.write_line(_row(f"  {folder}", accounts[folder]))


def _sum(accounts: Mapping[str, Account]) -> Account:
    parts = accounts.values()
    return Account(
        sum(part.num_tests for part in parts),
        sum(part.clock_s for part in parts),
        sum(part.processor_s for part in parts),
    )


def _row(name: str, account: Account) -> str:
    return (
        f"{name:<16} {account.num_tests:>5} tests {account.processor_s:>7.1f} s of processor {account.clock_s:>7.1f} s"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(SecondsByPart(), "seconds-by-part")


def pytest_collection_finish() -> None:
    """Take what imports have made out of every later garbage collection.

    It is never garbage, and with torch and transformers a collection takes 0.3 s, which workers pay at each job's end.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _own_state_and_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the state and the weights cache of whoever runs the suite out of it, children included."""
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("XDG_STATE_HOME", "XDG_CACHE_HOME"):
            patch.setenv(variable, str(tmp_path_factory.mktemp(variable.lower())))
        yield
