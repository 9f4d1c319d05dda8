"""A heavy probe in a process of its own, with a bound on its time: what it does to itself never reaches the caller."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_NUM_LAST_LINES = 3
_LONGEST_REASON = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildRun:
    """What a child told before it ended."""

    results: Mapping[str, Any] = field(default_factory=dict)
    """All its lines of JSON objects, merged."""
    exit_code: int = 0
    """Negative: minus the signal that ended it."""
    last_words: str = ""
    """The end of its stderr."""
    timed_out: bool = False

    @property
    def reason(self) -> str:
        """Why it ended as it did, in a line."""
        lines = [line.strip() for line in self.last_words.splitlines() if line.strip()]
        return lines[-1][:_LONGEST_REASON] if lines else f"exit code {self.exit_code} without a word"


def run_child(command: Sequence[str], *, timeout_s: float, environment: Mapping[str, str] | None = None) -> ChildRun:
    """Run a program that prints JSON objects on lines; killed after ``timeout_s`` seconds, and reaped in any case."""
    timed_out = False
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(environment or {})},
    ) as child:
        try:
            said, errors = child.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            timed_out = True
            child.kill()
            said, errors = child.communicate()
        except BaseException:
            child.kill()
            raise
    results: dict[str, Any] = {}
    for line in said.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            # A library may print; only our own lines are results.
            continue
        if isinstance(value, dict):
            results |= value
    last_words = "\n".join(errors.splitlines()[-_NUM_LAST_LINES:])
    return ChildRun(results=results, exit_code=child.returncode, last_words=last_words, timed_out=timed_out)
