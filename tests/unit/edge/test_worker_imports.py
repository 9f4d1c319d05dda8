"""Imports behind others: whose priority is lowered."""

from __future__ import annotations

import os
import sys
import threading

import pytest

from edge_node import worker_imports
from edge_node.worker_imports import LOWEST_PRIORITY, import_behind_others


def priority_of_this_thread() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a priority is a process's")
def test_imports_run_at_the_lowest_priority_and_what_is_started_later_does_not(monkeypatch):
    found = []
    monkeypatch.setattr(worker_imports, "_import", lambda: found.append(priority_of_this_thread()))
    before = priority_of_this_thread()

    import_behind_others()
    later = threading.Thread(target=lambda: found.append(priority_of_this_thread()))
    later.start()
    later.join()

    assert found == [LOWEST_PRIORITY, before]
    assert priority_of_this_thread() == before < LOWEST_PRIORITY


def test_an_import_that_fails_is_told(monkeypatch):
    def fail() -> None:
        raise ImportError("No module named 'torch'")

    monkeypatch.setattr(worker_imports, "_import", fail)
    with pytest.raises(ImportError, match="torch"):
        import_behind_others()
