"""Jobs of one benchmark beside each other, each in a lane of processors that no other job has."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

_LOOK_EVERY_S = 0.5

Case = dict[str, Any]
"""Settings of one job; ``agents`` with ``threads`` processors each make its lane."""


def run_in_lanes(
    module: str,
    cases: Sequence[Case],
    folder: Path,
    available: Sequence[int],
    *,
    minutes: float,
    on_figures: Callable[[Case, dict[str, Any]], None],
) -> bool:
    """Run cases as processes, as many at once as there are processors; none is left when this returns.

    Args:
        module: a benchmark whose command line takes ``--case``, which :func:`answer_case` answers.
        cases: what to run, in this order where there is a choice.
        folder: for the processes' results.
        available: processors. A lane wider than all of them runs alone and shares them.
        minutes: no case begins later, and what still runs a while after is ended.
        on_figures: takes each case with its figures, or with an ``error``.

    Returns:
        Whether all went well.
    """
    waiting, free = list(cases), list(available)
    running: list[tuple[subprocess.Popen[bytes], Case, list[int], Path]] = []
    deadline_s = time.monotonic() + 60 * minutes
    is_well = True
    try:
        while running or (waiting and time.monotonic() < deadline_s):
            for case in list(waiting):
                needed = case["agents"] * case["threads"]
                is_wide = needed > len(available)
                if time.monotonic() > deadline_s or (needed > len(free) and (running or not is_wide)):
                    continue
                lane, free = free[:needed], free[needed:]
                waiting.remove(case)
                result = folder / f"part{len(cases) - len(waiting)}.json"
                result.unlink(missing_ok=True)
                own = [lane[i * case["threads"] : (i + 1) * case["threads"]] for i in range(case["agents"])]
                asked = json.dumps([case, [] if is_wide else own])
                command = [sys.executable, "-m", module, "--out", str(result), "--case", asked]
                running.append((subprocess.Popen(command), case, lane, result))
            time.sleep(_LOOK_EVERY_S)
            for item in [item for item in running if item[0].poll() is not None]:
                child, case, lane, result = item
                running.remove(item)
                free += lane
                known = result.exists()
                figures = json.loads(result.read_text()) if known else {"error": f"ended with {child.returncode}"}
                result.unlink(missing_ok=True)
                is_well &= "error" not in figures
                on_figures(case, figures)
            if time.monotonic() > deadline_s + 60:
                break
    finally:
        for child, *_ in running:
            child.terminate()
        for child, *_ in running:
            try:
                child.wait(60)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
    return is_well and not waiting and not running


def end_when_terminated() -> None:
    """SIGTERM leaves every ``with`` block, which ends the processes that were started there."""

    def end(signal_number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + signal_number)

    signal.signal(signal.SIGTERM, end)


def answer_case(asked: str, out: Path, run: Callable[[Case, Sequence[Sequence[int]]], Mapping[str, Any]]) -> int:
    """What a process of :func:`run_in_lanes` does: run its case, leave figures or the error; the exit status."""
    case, cores = json.loads(asked)
    try:
        figures = run(case, cores)
    except Exception as error:
        figures = {"error": repr(error)[-3000:]}
    out.write_text(json.dumps(figures))
    return int("error" in figures)
