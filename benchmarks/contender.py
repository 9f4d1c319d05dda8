"""What is compared: contenders that train one step at a time on demand, and how one in child processes is spoken to.

A contender in child processes starts once, before anything is measured, then waits for orders without using the
processors, so that several of them can take turns on one machine. Orders and answers are JSON lines:

    to its stdin:      {"steps": 2}
    from its stdout:   {"ready": {...facts...}} once, then for each step {"step": 0, "seconds": 1.2, "loss": 9.7}

It ends when its stdin closes.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any, Protocol

START_TIMEOUT_S = 180.0
STEP_TIMEOUT_S = 300.0
END_TIMEOUT_S = 20.0
STDERR_TAIL_BYTES = 4000


class ContenderError(Exception):
    """A contender did not start, died, or did not answer in time."""


@dataclass(frozen=True, slots=True)
class StepFigures:
    """One optimiser step as its contender saw it."""

    step: int
    """Number of the step, counted from 0 over all turns."""
    seconds: float
    """Wall time from the batch's tokens to updated adapters."""
    loss: float
    """Mean token loss of the step's batch, before the update."""


class Contender(Protocol):
    """Something that trains, measured in turns with others of its kind on the same workload."""

    @property
    def name(self) -> str:
        """Short name, unique among those it is compared with."""

    def start(self) -> Mapping[str, object]:
        """Get everything ready that is not to be measured; gives facts worth keeping with the figures.

        Raises:
            ContenderError: it does not start.
        """

    def run_steps(self, num_steps: int) -> Sequence[StepFigures]:
        """Train this many further steps and come to rest: nothing of it may use the processors afterwards.

        Raises:
            ContenderError: it died or did not answer in time.
        """

    def close(self) -> None:
        """End it and everything it started; may be called at any time, also twice."""


@dataclass(frozen=True, slots=True)
class ChildCommand:
    """How one process of a contender is started."""

    arguments: Sequence[str]
    """Arguments after the interpreter, such as ``-m benchmarks.peers.one_process``."""
    threads: int
    """Threads for arithmetic."""


class ChildContender:
    """A contender of one or more processes that run each step together; a step takes as long as the slowest does."""

    def __init__(self, name: str, commands: Sequence[ChildCommand]) -> None:
        self.name = name
        self._commands = commands
        self._children: list[_Child] = []

    def start(self) -> Mapping[str, object]:
        """Start all processes together, for they may have to find each other; gives the first one's facts."""
        for index, command in enumerate(self._commands):
            self._children.append(_Child(f"{self.name}[{index}]", command))
        facts = [child.read(START_TIMEOUT_S)["ready"] for child in self._children]
        first: Mapping[str, object] = facts[0]
        return first

    def run_steps(self, num_steps: int) -> Sequence[StepFigures]:
        """Order all processes to run the steps, and take them together."""
        for child in self._children:
            child.write({"steps": num_steps})
        figures = []
        for _ in range(num_steps):
            parts = [child.read(STEP_TIMEOUT_S) for child in self._children]
            # Only the process that holds the head knows the loss.
            losses = [part["loss"] for part in parts if part["loss"] is not None]
            figures.append(
                StepFigures(parts[0]["step"], seconds=max(part["seconds"] for part in parts), loss=losses[0])
            )
        return figures

    def close(self) -> None:
        """Close all stdins first: processes that run together end together."""
        for child in self._children:
            child.ask_to_end()
        for child in self._children:
            child.reap()
        self._children = []


class _Child:
    """One process, with its answers read by a thread so that every wait has a bound."""

    def __init__(self, label: str, command: ChildCommand) -> None:
        threads = str(command.threads)
        self._label = label
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 -- closed by reap
        self._process = subprocess.Popen(
            [sys.executable, *command.arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env={
                **os.environ,
                "OMP_NUM_THREADS": threads,
                "MKL_NUM_THREADS": threads,
                "TOKENIZERS_PARALLELISM": "false",
            },
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._stdin: IO[bytes] = self._process.stdin
        self._lines: queue.Queue[bytes | None] = queue.Queue()
        self._reader = threading.Thread(target=self._pump, args=(self._process.stdout,), name=label, daemon=True)
        self._reader.start()

    def _pump(self, stdout: IO[bytes]) -> None:
        with stdout:
            for line in stdout:
                self._lines.put(line)
        self._lines.put(None)

    def write(self, order: Mapping[str, object]) -> None:
        try:
            self._stdin.write(json.dumps(order).encode() + b"\n")
            self._stdin.flush()
        except BrokenPipeError:
            raise ContenderError(f"{self._label} has ended: {self._stderr_tail()}") from None

    def read(self, timeout_s: float) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            raise ContenderError(f"{self._label} did not answer in {timeout_s:.0f} s: {self._stderr_tail()}") from None
        if line is None:
            raise ContenderError(f"{self._label} has ended: {self._stderr_tail()}")
        answer = json.loads(line)
        assert isinstance(answer, dict)
        return answer

    def ask_to_end(self) -> None:
        # Broken: it has ended already, with an order unread.
        with contextlib.suppress(BrokenPipeError):
            self._stdin.close()

    def reap(self) -> None:
        try:
            self._process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        self._stderr.close()

    def _stderr_tail(self) -> str:
        size = self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, size - STDERR_TAIL_BYTES))
        return self._stderr.read().decode(errors="replace").strip() or "it wrote nothing to stderr"


def serve_steps(run_step: Callable[[int], float | None], facts: Mapping[str, object]) -> None:
    """The child's side: run steps as ordered until stdin closes; stdout belongs to the answers.

    Args:
        run_step: Trains one step given its number; gives the batch's mean token loss, or None where it is not known.
        facts: What the runner should keep with the figures.
    """

    def answer(message: Mapping[str, object]) -> None:
        print(json.dumps(message), flush=True)

    answer({"ready": dict(facts)})
    step = 0
    for line in sys.stdin:
        for _ in range(json.loads(line)["steps"]):
            start_s = time.perf_counter()
            loss = run_step(step)
            answer({"step": step, "seconds": time.perf_counter() - start_s, "loss": loss})
            step += 1
