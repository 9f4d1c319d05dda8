"""Probes read what is there: made-up cgroups, real folders and databases, children that break."""

from __future__ import annotations

import sqlite3
import sys
from pathlib import Path

import pytest

from plutino.doctor.child import run_child
from plutino.doctor.machine import read_disk, read_limits, read_memory, read_processor, sqlite_damage


def system(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


CGROUPS = [
    ("none", {}, None, None),
    (
        "version 2, limits at two levels: the tighter counts",
        {
            "proc/self/cgroup": "0::/system.slice/plutino.service\n",
            "sys/fs/cgroup/system.slice/plutino.service/memory.max": "max\n",
            "sys/fs/cgroup/system.slice/plutino.service/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/system.slice/memory.max": "1073741824\n",
            "sys/fs/cgroup/system.slice/cpu.max": "max 100000\n",
        },
        1 << 30,
        1.5,
    ),
    (
        "version 2, a container that does not see its place",
        {
            "proc/self/cgroup": "0::/docker/abc\n",
            "sys/fs/cgroup/memory.max": "536870912\n",
            "sys/fs/cgroup/cpu.max": "50000 100000\n",
        },
        512 << 20,
        0.5,
    ),
    (
        "version 1, no limit is a large number",
        {
            "proc/self/cgroup": "4:memory:/box\n3:cpu,cpuacct:/box\n",
            "sys/fs/cgroup/memory/box/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/cpu/box/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/box/cpu.cfs_period_us": "100000\n",
        },
        None,
        None,
    ),
    (
        "version 1, limited",
        {
            "proc/self/cgroup": "4:memory:/box\n3:cpu,cpuacct:/box\n",
            "sys/fs/cgroup/memory/box/memory.limit_in_bytes": "268435456\n",
            "sys/fs/cgroup/cpu/box/cpu.cfs_quota_us": "5000\n",
            "sys/fs/cgroup/cpu/box/cpu.cfs_period_us": "10000\n",
        },
        256 << 20,
        0.5,
    ),
]


@pytest.mark.parametrize(
    ("files", "limit_bytes", "quota"), [row[1:] for row in CGROUPS], ids=[row[0] for row in CGROUPS]
)
def test_cgroup_limits_are_read(tmp_path, files, limit_bytes, quota):
    root = system(tmp_path, files)

    assert read_memory(root).cgroup_limit_bytes == limit_bytes
    assert read_processor(root).quota_cores == quota


def test_threads_that_help_are_the_quota_rounded_up(tmp_path):
    root = system(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"})

    assert read_processor(root).useful_threads == 1


def test_this_machine_is_read_without_invention():
    memory = read_memory()

    assert 0 < memory.available_bytes <= memory.total_bytes
    assert read_processor().useful_threads >= 1
    assert set(read_limits()) == {"NOFILE", "DATA", "AS", "NPROC", "STACK"}


def test_disk_of_a_folder_that_does_not_exist_is_judged_by_its_parent_and_nothing_is_left(tmp_path):
    disk = read_disk(tmp_path / "not" / "yet", tries_sync=True)

    assert (disk.is_writable, disk.free_bytes > 0, disk.sync_s is not None and disk.sync_s > 0) == (True, True, True)
    assert list(tmp_path.iterdir()) == []


def test_sound_database_in_use_is_sound_and_a_damaged_one_is_told(tmp_path):
    path = tmp_path / "plutino.sqlite"
    assert sqlite_damage(path) is None
    writer = sqlite3.connect(path)
    writer.execute("PRAGMA journal_mode=WAL")
    writer.execute("CREATE TABLE rows (text TEXT)")
    writer.executemany("INSERT INTO rows VALUES (?)", [("x" * 500,)] * 200)
    writer.commit()
    assert sqlite_damage(path) is None
    writer.close()

    content = bytearray(path.read_bytes())
    content[4096 : 3 * 4096] = bytes(2 * 4096)
    path.write_bytes(content)

    assert sqlite_damage(path)


def child(code: str, timeout_s: float = 20.0):
    return run_child([sys.executable, "-c", code], timeout_s=timeout_s)


def test_child_that_dies_half_way_leaves_what_it_told():
    run = child("import os, sys; print('noise'); print('{\"a\": 1}', flush=True); sys.stderr.write('why'); os.abort()")

    assert (run.results, run.exit_code, run.last_words) == ({"a": 1}, -6, "why")


def test_child_that_hangs_is_killed_and_reaped():
    run = child("import time; print('{\"a\": 1}', flush=True); time.sleep(600)", timeout_s=1.0)

    assert (run.timed_out, run.exit_code, run.results) == (True, -9, {"a": 1})
