"""Imports behind others: whose priority is lowered."""

from __future__ import annotations

import errno
import os
import sys
import threading

import pytest

from edge_node import worker_imports
from edge_node.worker_imports import LOW_PRIORITY, import_behind_others


def priority_of_this_thread() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a priority is a process's")
def test_imports_run_at_a_low_priority_and_what_is_started_later_does_not(monkeypatch):
    found = []
    monkeypatch.setattr(worker_imports, "_import", lambda: found.append(priority_of_this_thread()))
    before = priority_of_this_thread()

    import_behind_others()
    later = threading.Thread(target=lambda: found.append(priority_of_this_thread()))
    later.start()
    later.join()

    assert found == [LOW_PRIORITY, before]
    assert priority_of_this_thread() == before < LOW_PRIORITY


def test_an_import_that_fails_is_told_and_the_session_gets_its_priority_back(monkeypatch, autogroup):
    def fail() -> None:
        raise ImportError("No module named 'torch'")

    monkeypatch.setattr(worker_imports, "_import", fail)
    with pytest.raises(ImportError, match="torch"):
        import_behind_others()
    assert autogroup.read_text() == "0"


@pytest.fixture
def autogroup(monkeypatch, tmp_path):
    """What the kernel would be told of the session that this process leads."""
    path = tmp_path / "autogroup"
    path.write_text("/autogroup-7 nice 0")
    monkeypatch.setattr(worker_imports, "OWN_AUTOGROUP", path)
    monkeypatch.setattr(os, "getsid", lambda _: os.getpid())
    return path


def test_the_session_has_a_low_priority_while_imports_run(monkeypatch, autogroup):
    found = []
    monkeypatch.setattr(worker_imports, "_import", lambda: found.append(autogroup.read_text()))

    import_behind_others()

    assert [*found, autogroup.read_text()] == [str(LOW_PRIORITY), "0"]


def test_a_session_that_others_share_keeps_its_priority(monkeypatch, autogroup):
    monkeypatch.setattr(os, "getsid", lambda _: os.getpid() + 1)
    monkeypatch.setattr(worker_imports, "_import", lambda: None)

    import_behind_others()

    assert autogroup.read_text() == "/autogroup-7 nice 0"


def test_a_kernel_that_is_not_ready_for_the_next_change_is_asked_again(monkeypatch, autogroup):
    class Busy:
        said = 0

        def exists(self) -> bool:
            return True

        def write_text(self, text: str, encoding: str) -> None:
            self.said += 1
            if self.said % 2:
                raise OSError(errno.EAGAIN, "try again")
            autogroup.write_text(text)

    found = []
    monkeypatch.setattr(worker_imports, "_BETWEEN_TRIES_S", 0.0)
    monkeypatch.setattr(worker_imports, "OWN_AUTOGROUP", Busy())
    monkeypatch.setattr(worker_imports, "_import", lambda: found.append(autogroup.read_text()))

    import_behind_others()

    assert [*found, autogroup.read_text()] == [str(LOW_PRIORITY), "0"]
