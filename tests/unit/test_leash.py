from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil

from tests.leash import Leash

SLEEP = [sys.executable, "-S", "-E", "-c", "import time; time.sleep(60)"]


def start_sleeper() -> subprocess.Popen[bytes]:
    return subprocess.Popen(SLEEP, start_new_session=True)


def test_leash_whose_holder_was_killed_ends_what_it_held():
    program = (
        "import subprocess, sys, time\nfrom tests.leash import Leash\nfrom tests.unit.test_leash import start_sleeper\n"
        "leash, held, other = Leash(), start_sleeper(), start_sleeper()\n"
        "leash.hold(held.pid)\nleash.hold(other.pid)\nleash.let_go(other.pid)\n"
        "print(leash._watcher.pid, held.pid, other.pid, flush=True)\ntime.sleep(60)\n"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as holder:
        assert holder.stdout is not None
        watcher, held, other = (psutil.Process(int(pid)) for pid in holder.stdout.readline().split())
        holder.kill()

    ended, _ = psutil.wait_procs([watcher, held], timeout=30)
    was_left_alone = other.is_running()
    other.kill()

    assert {process.pid for process in ended} == {watcher.pid, held.pid}
    assert was_left_alone
    psutil.wait_procs([other], timeout=10)


def test_leash_closed_ends_its_watcher():
    leash = Leash()

    leash.close()

    assert leash._watcher.returncode == 0
