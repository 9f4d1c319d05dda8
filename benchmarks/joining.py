"""How long a device takes to become a member: the call alone, and a new process from its command line on.

``python -m benchmarks.joining``. The time until its first worker has done its imports comes on top of that: seconds,
which every start of an agent takes, joined before or not.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from benchmarks.stack import PlutinoStack
from edge_node.joining import MEMBERSHIP_FILE, join
from plutino.errors import PlutinoError
from plutino.security.tokens import JoinToken

TURNS = 7
GOAL_S = 2.0
_PROCESS_TIMEOUT_S = 60.0
_POLL_S = 0.005


def main() -> int:
    """Measure, print, and give 1 if the median of the processes misses the goal."""
    with tempfile.TemporaryDirectory(prefix="plutino-joining-") as folder, PlutinoStack(Path(folder)) as stack:
        text = stack.client.members.create_token(uses=2 * TURNS, ttl_s=3600.0).token
        token_path = Path(folder) / "token"
        token_path.write_text(text, encoding="ascii")
        token = JoinToken.decode(text)
        calls_s: list[float] = []
        processes_s: list[float] = []
        processors_s: list[float] = []
        for turn in range(TURNS):
            calls_s.append(_time_call(token, Path(folder) / f"call{turn}"))
            process_s, processor_s = _time_process(token_path, Path(folder) / f"process{turn}")
            processes_s.append(process_s)
            processors_s.append(processor_s)
    print(f"the call     {_spread(calls_s)}")
    print(f"the process  {_spread(processes_s)}")
    print(f"its processor time  {_spread(processors_s)}")
    return 0 if statistics.median(processes_s) < GOAL_S else 1


def _time_call(token: JoinToken, state_dir: Path) -> float:
    state_dir.mkdir()
    start_s = time.perf_counter()
    join(token, "benchmark", state_dir)
    return time.perf_counter() - start_s


def _time_process(token_path: Path, state_dir: Path) -> tuple[float, float]:
    """Seconds until it is a member, and seconds of processor time that took."""
    arguments = ("--token-file", str(token_path), "--name", "benchmark", "--state-dir", str(state_dir))
    start_s = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "edge_node.cli", "join", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while not (state_dir / MEMBERSHIP_FILE).exists():
            if process.poll() is not None:
                raise PlutinoError(f"a joining process ended with exit code {process.returncode}")
            if time.perf_counter() - start_s > _PROCESS_TIMEOUT_S:
                raise PlutinoError(f"a process did not join within {_PROCESS_TIMEOUT_S:.0f} s")
            time.sleep(_POLL_S)
        times = psutil.Process(process.pid).cpu_times()
        return time.perf_counter() - start_s, times.user + times.system
    finally:
        process.terminate()
        process.wait(_PROCESS_TIMEOUT_S)


def _spread(seconds: list[float]) -> str:
    return (
        f"median {statistics.median(seconds) * 1000:.0f} ms, {min(seconds) * 1000:.0f} to {max(seconds) * 1000:.0f} ms "
        f"({len(seconds)} turns)"
    )


if __name__ == "__main__":
    sys.exit(main())
