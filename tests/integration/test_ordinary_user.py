"""An agent needs no root: started as a user who owns nothing but a state folder, it joins, works and ends."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.integration.stack import WAIT_S, People, ThreadCoordinator, wait_until

NOBODY = 65534
AS_NOBODY = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--no-new-privs")
"""Another user for everybody."""
WITHOUT_RIGHTS = ("unshare", "--user", f"--map-user={NOBODY}", f"--map-group={NOBODY}")
"""Nobody in a user namespace: no capability is left, but files of whoever runs the suite stay readable."""
REPOSITORY_DIR = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def ordinary_user() -> tuple[str, ...]:
    """What makes a command an ordinary user's; skips where the suite itself runs as one."""
    if os.geteuid() != 0:
        pytest.skip("this suite runs as an ordinary user already, and so do all its agents")
    reads = (sys.executable, "-c", "import sys, edge_node.agent; sys.exit(sys.version != sys.argv[1])", sys.version)
    for prefix in (AS_NOBODY, WITHOUT_RIGHTS):
        if shutil.which(prefix[0]) is None:
            continue
        ended = subprocess.run([*prefix, *reads], cwd=REPOSITORY_DIR, capture_output=True, timeout=WAIT_S)
        if ended.returncode == 0:
            return prefix
    pytest.skip(f"nobody else may read {REPOSITORY_DIR} or its environment, and user namespaces are not allowed")


@pytest.fixture
def nobodys_folder(ordinary_user: tuple[str, ...]) -> Iterator[Path]:
    """A folder that the user owns, below no folder that others may not enter."""
    with tempfile.TemporaryDirectory(prefix="plutino-nobody-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "state").mkdir(mode=0o700)
        if ordinary_user == AS_NOBODY:
            os.chown(folder / "state", NOBODY, NOBODY)
        yield folder / "state"


def capabilities(pid: int) -> int:
    """What of root's rights a process has, as the kernel counts them."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff")), 16)


def test_agent_of_an_ordinary_user_joins_with_its_worker_and_leaves_nothing(ordinary_user, nobodys_folder, tmp_path):
    coordinator = ThreadCoordinator(tmp_path / "coordinator")
    people = People(coordinator.endpoints.people_address)
    program = [sys.executable, str(Path(__file__).with_name("ordinary_agent.py"))]
    agent = subprocess.Popen(
        [*ordinary_user, *program, coordinator.endpoints.devices_address, str(nobodys_folder)],
        cwd=REPOSITORY_DIR,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY_DIR), "HOME": "/nonexistent"},
    )
    try:
        wait_until(lambda: people.devices() or agent.poll() is not None, "the agent's hello")
        assert [device["name"] for device in people.devices()] == ["ordinary"]
        family = [psutil.Process(agent.pid), *psutil.Process(agent.pid).children(recursive=True)]
        assert [capabilities(process.pid) for process in family] == [0, 0]

        agent.send_signal(signal.SIGTERM)
        assert agent.wait(WAIT_S) == 0
        assert psutil.wait_procs(family, timeout=WAIT_S)[1] == []
    finally:
        agent.kill()
        agent.wait(WAIT_S)
        people.close()
        coordinator.close()
