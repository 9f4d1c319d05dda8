"""What sampled answers are worth: comparisons of texts, and a function of the user's in a process of its own.

Entry point: :func:`rewards_of`.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

from plutino.errors import ConfigError
from plutino.job.rewards import (
    AdapterReward,
    ExactMatchReward,
    FunctionReward,
    RegexReward,
    RewardSource,
    ValidJsonReward,
)

_SHOWN_CHARS = 80
_END_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Answer:
    """One sampled answer with what it answers."""

    prompt: str
    answer: str
    truth: str
    line_number: int
    """Of the prompt in its file."""
    adapter_reward: float | None = None


def rewards_of(sources: Sequence[RewardSource], answers: Sequence[Answer]) -> list[list[float]]:
    """What each source gives for each answer, without weights: one list a source.

    Raises:
        ConfigError: a function fails, answers too late, or gives what is no number.
    """
    return [list(_of_source(source, answers)) for source in sources]


def _of_source(source: RewardSource, answers: Sequence[Answer]) -> Iterator[float]:
    match source:
        case ExactMatchReward():
            return (float(one.answer.strip() == one.truth.strip()) for one in answers)
        case RegexReward(pattern=pattern):
            return (float(re.search(pattern, one.answer) is not None) for one in answers)
        case ValidJsonReward():
            return (float(_is_json(one.answer)) for one in answers)
        case AdapterReward():
            return (_given(one) for one in answers)
        case FunctionReward():
            return _of_function(source, answers)


def _given(one: Answer) -> float:
    assert one.adapter_reward is not None, "the reward adapter scores before other sources"
    return one.adapter_reward


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _of_function(source: FunctionReward, answers: Sequence[Answer]) -> Iterator[float]:
    path, _, name = source.function.rpartition(":")
    process = subprocess.Popen(
        [sys.executable, "-m", "coordinator.jobs.reward_process", path, name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        for one in answers:
            where = f"{source.function} on an answer to line {one.line_number} ({one.answer[:_SHOWN_CHARS]!r})"
            request = {"prompt": one.prompt, "answer": one.answer, "truth": one.truth}
            try:
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
            except BrokenPipeError:
                pass  # its last words say why
            yield _value_of(_line_within(process, process.stdout, source.time_limit_s), where, source.time_limit_s)
    finally:
        process.kill()
        process.wait(_END_TIMEOUT_S)
        process.stdin.close()
        process.stdout.close()


def _line_within(process: subprocess.Popen[str], stdout: IO[str], limit_s: float) -> str | None:
    """The next line; None if it does not come in time, which ends the process."""
    timer = threading.Timer(limit_s, process.kill)
    timer.daemon = True
    timer.start()
    try:
        line = stdout.readline()
    finally:
        timer.cancel()
    return line or None


def _value_of(line: str | None, where: str, limit_s: float) -> float:
    if line is None:
        raise ConfigError(
            f"{where} gave nothing within {limit_s:g} s, or ended its process; make it faster, or raise the reward's "
            "time_limit_s"
        )
    answer: dict[str, Any] = json.loads(line)
    if "error" in answer:
        raise ConfigError(f"{where} failed: {answer['error']}")
    value = answer["value"]
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(f"{where} gave {value!r}; it must give a finite number")
    return float(value)
