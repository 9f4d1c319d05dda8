from __future__ import annotations

import signal
import subprocess
import sys

import psutil
import pytest

from coordinator.demo.children import Children, interrupted_by_termination
from plutino.errors import PlutinoError

SLEEPER = "import sys, time; print('up', flush=True); time.sleep(60)"
STUBBORN = "import signal, sys, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"


def is_up(child) -> bool | None:
    return b"up" in child.log_path.read_bytes() or None


def test_children_none_outlives_the_block_that_fails(tmp_path):
    with pytest.raises(ZeroDivisionError), Children(tmp_path) as children:
        child = children.start("sleeper", "-c", SLEEPER)
        children.wait_for("its start", lambda: is_up(child), 10)
        raise ZeroDivisionError

    assert child.process.returncode == -signal.SIGTERM
    assert not psutil.pid_exists(child.process.pid)


def test_children_one_that_does_not_listen_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr("coordinator.demo.children._END_S", 0.1)
    with Children(tmp_path) as children:
        child = children.start("stubborn", "-c", STUBBORN)
        children.wait_for("its start", lambda: is_up(child), 10)

    assert child.process.returncode == -signal.SIGKILL


def test_child_whose_starter_was_killed_ends_itself(tmp_path):
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom coordinator.demo.children import Children\n"
        "with Children(Path(sys.argv[1])) as children:\n"
        "    child = children.start('sleeper', '-c', sys.argv[2])\n"
        "    children.wait_for('its start', lambda: b'up' in child.log_path.read_bytes() or None, 10)\n"
        "    print(child.process.pid, flush=True)\n    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path), SLEEPER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        child = psutil.Process(int(starter.stdout.readline()))
        starter.kill()

    _, alive = psutil.wait_procs([child], timeout=10)
    assert alive == []


def test_wait_for_child_that_ends_tells_its_last_words(tmp_path):
    with Children(tmp_path) as children, pytest.raises(PlutinoError, match=r"agent ended with exit code 3: no room"):
        children.start("agent", "-c", "import sys; print('no room'); sys.exit(3)")
        children.wait_for("its joining", lambda: None, 10)


def test_wait_for_what_never_comes_names_the_logs(tmp_path):
    with Children(tmp_path) as children, pytest.raises(PlutinoError, match=r"its joining did not .*sleeper\.log"):
        children.start("sleeper", "-c", SLEEPER)
        children.wait_for("its joining", lambda: None, 0.2)


def test_wait_for_end_failure_is_an_error(tmp_path):
    with Children(tmp_path) as children, pytest.raises(PlutinoError, match="exit code 1"):
        children.wait_for_end(children.start("reference", "-c", "raise SystemExit(1)"), 10)


def test_termination_is_an_interrupt_only_inside_the_block():
    before = signal.getsignal(signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt), interrupted_by_termination():
        signal.raise_signal(signal.SIGTERM)

    assert signal.getsignal(signal.SIGTERM) is before
