"""The agent's decisions, as pure functions: what fits, when a spare is due, and what a worker's end means."""

from __future__ import annotations

import signal
from collections.abc import Collection
from dataclasses import dataclass

from plutino.sizes import format_size

NOT_STARTED_EXIT_CODE = 126
"""Exit code reported for a worker that was refused: what shells give a command that cannot be run."""

MAX_REASON_BYTES = 4096
"""Bound on a reason, so that it fits a control message whatever a worker wrote into its log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exiting:
    """A worker's own account of its end."""

    reason: str
    out_of_memory: bool
    error: str
    """Name of the error class; empty for an end in good order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """All that the agent knows of a process that has ended."""

    exit_code: int
    """Negative: minus the number of the signal that ended it."""
    over_budget: str | None
    """Why the agent killed it for its memory, if it did."""
    stop_reason: str | None
    """Why it was told to stop, if it was."""
    exiting: Exiting | None
    """Its last word, if it said one."""
    log_tail: str
    log_path: str


def refusal(budget_bytes: int, running_budgets_bytes: Collection[int], memory_budget_bytes: int) -> str | None:
    """Why a worker with this budget cannot start beside those that run; None if it can."""
    taken_bytes = sum(running_budgets_bytes)
    if taken_bytes + budget_bytes <= memory_budget_bytes:
        return None
    return (
        f"the worker's budget of {format_size(budget_bytes)} does not fit: {len(running_budgets_bytes)} running workers"
        f" take {format_size(taken_bytes)} of the device's {format_size(memory_budget_bytes)}; "
        "end a job there or raise the device's --memory"
    )


def spare_is_due(
    *,
    has_spare: bool,
    running_budgets_bytes: Collection[int],
    baseline_bytes: int,
    memory_budget_bytes: int,
    since_last_start_s: float,
    settle_s: float,
) -> bool:
    """Whether to start a spare worker now.

    A spare's imports keep a core busy for seconds, so while workers run it waits until the newest one has had
    ``settle_s`` seconds to load.
    """
    if has_spare or sum(running_budgets_bytes) + baseline_bytes > memory_budget_bytes:
        return False
    return not running_budgets_bytes or since_last_start_s >= settle_s


def over_budget(rss_bytes: int, budget_bytes: int, who: str) -> str | None:
    """Why a process must end for its memory; None if it is within its budget."""
    if rss_bytes <= budget_bytes:
        return None
    return (
        f"{who} holds {format_size(rss_bytes)} ({rss_bytes} bytes), its memory budget is {format_size(budget_bytes)}; "
        "lower micro_batch_size or max_tokens, or raise the device's --memory"
    )


def describe_end(ending: Ending) -> tuple[str, bool]:
    """Why a worker ended, in a sentence for a person, and whether it passed its memory budget."""
    if ending.over_budget is not None:
        return _cut(ending.over_budget), True
    if ending.exiting is not None and (ending.exiting.error or ending.stop_reason is None):
        error = f"{ending.exiting.error}: " if ending.exiting.error else ""
        return _cut(f"{error}{ending.exiting.reason}"), ending.exiting.out_of_memory
    if ending.stop_reason is not None:
        return _cut(f"stopped: {ending.stop_reason}"), False
    return _cut(f"{_by_exit_code(ending.exit_code)}; log {ending.log_path}{_tail(ending.log_tail)}"), False


def _by_exit_code(exit_code: int) -> str:
    if exit_code >= 0:
        return f"the worker ended with exit code {exit_code} without a word"
    try:
        name = signal.Signals(-exit_code).name
    except ValueError:
        name = f"signal {-exit_code}"
    hint = "; the kernel does so when the whole device runs out of memory" if -exit_code == signal.SIGKILL else ""
    return f"the worker was killed by {name}{hint}"


def _tail(log_tail: str) -> str:
    return f", which ends:\n{log_tail}" if log_tail else ", which is empty"


def _cut(text: str) -> str:
    encoded = text.encode()
    if len(encoded) <= MAX_REASON_BYTES:
        return text
    # The head says what happened, the end of a log why.
    half = MAX_REASON_BYTES // 2 - 8
    return f"{encoded[:half].decode(errors='ignore')}\n[...]\n{encoded[-half:].decode(errors='ignore')}"
