from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from coordinator.scheduling.ray_backend.reaping import (
    SESSION_PREFIX,
    ProcessRecord,
    RecordedProcess,
    forget,
    is_running,
    process_tree,
    read_record,
    reap,
    write_record,
)
from plutino.errors import StoreError

WAIT_S = 10.0


class Child:
    """A process that waits to be killed; with ``mark`` on its command line."""

    def __init__(self, mark: str, code: str = "") -> None:
        script = f"import os, sys\n{code}\nprint('up', flush=True)\nsys.stdin.read()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", script, mark], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.first_line = self.process.stdout.readline().strip()

    @property
    def recorded(self) -> RecordedProcess:
        start_time_s = psutil.Process(self.process.pid).create_time()
        return RecordedProcess(pid=self.process.pid, start_time_s=start_time_s, name="child")

    def close(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=WAIT_S)


@pytest.fixture
def child() -> Iterator[Child]:
    child = Child("mark-of-a-child")
    yield child
    child.close()


@pytest.fixture
def parent_with_grandchild() -> Iterator[Child]:
    """Its first line is the pid of the grandchild, which ends with its parent at the latest."""
    code = (
        "import subprocess\n"
        "below = subprocess.Popen([sys.executable, '-c', 'import sys; sys.stdin.read()'], stdin=subprocess.PIPE)\n"
        "print(below.pid, flush=True)"
    )
    parent = Child("mark-of-a-parent", code)
    yield parent
    parent.close()


def test_reap_recorded_orphan_is_killed(child: Child) -> None:
    recorded = child.recorded

    assert reap([recorded]) == (recorded,)

    assert not psutil.pid_exists(recorded.pid)


def test_reap_pid_with_another_start_time_is_left_alone(child: Child) -> None:
    recorded = child.recorded

    assert reap([recorded.model_copy(update={"start_time_s": recorded.start_time_s - 1})]) == ()

    assert is_running(recorded)


def test_reap_process_that_has_ended_is_no_error(child: Child) -> None:
    recorded = child.recorded
    child.close()

    assert reap([recorded]) == ()


def test_reap_orphan_takes_its_unrecorded_children_along(parent_with_grandchild: Child) -> None:
    grandchild = psutil.Process(int(parent_with_grandchild.first_line))

    reap([parent_with_grandchild.recorded])

    # Its parent is gone, so a zombie of it may wait for the machine's init.
    assert not grandchild.is_running() or grandchild.status() == psutil.STATUS_ZOMBIE


def test_process_tree_holds_marked_children_and_what_is_below_them(child: Child, parent_with_grandchild: Child) -> None:
    tree = process_tree(os.getpid(), mark="mark-of-a-parent")

    assert {process.pid for process in tree} == {
        parent_with_grandchild.process.pid,
        int(parent_with_grandchild.first_line),
    }


def test_process_tree_of_a_pid_that_is_gone_is_empty(child: Child) -> None:
    child.close()

    assert process_tree(child.process.pid, mark="") == ()


def test_record_written_is_read_back_and_replaces_the_older_one(tmp_path: Path, child: Child) -> None:
    path = tmp_path / "processes.json"
    write_record(path, ProcessRecord(session_dir=tmp_path))

    record = ProcessRecord(session_dir=tmp_path / "other", processes=(child.recorded,))
    write_record(path, record)

    assert read_record(path) == record
    assert [entry.name for entry in tmp_path.iterdir()] == ["processes.json"]


def test_read_record_without_file_gives_none(tmp_path: Path) -> None:
    assert read_record(tmp_path / "processes.json") is None


def test_read_record_damaged_file_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "processes.json"
    path.write_text('{"session_dir": "/x", "processes": [{"pid": 1}]}')

    with pytest.raises(StoreError, match="then remove the file"):
        read_record(path)


def test_forget_ends_processes_and_removes_folder_and_record(tmp_path: Path, child: Child) -> None:
    path, session_dir = tmp_path / "processes.json", tmp_path / f"{SESSION_PREFIX}x"
    (session_dir / "r").mkdir(parents=True)
    record = ProcessRecord(session_dir=session_dir, processes=(child.recorded,))
    write_record(path, record)

    assert forget(path, record) == record.processes

    assert list(tmp_path.iterdir()) == []


def test_forget_refuses_to_remove_a_folder_that_is_not_a_session(tmp_path: Path) -> None:
    path, precious_dir = tmp_path / "processes.json", tmp_path / "precious"
    precious_dir.mkdir()

    with pytest.raises(StoreError, match="precious"):
        forget(path, ProcessRecord(session_dir=precious_dir))

    assert precious_dir.exists()
