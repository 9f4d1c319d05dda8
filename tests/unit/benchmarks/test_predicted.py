from __future__ import annotations

import os
import subprocess
import sys

import pytest

from benchmarks.beside import run_beside
from benchmarks.predicted import FULL, runs_of
from benchmarks.processor_quota import ProcessorQuota, quota_refusal


def test_predictions_are_asked_of_at_least_eight_different_runs():
    runs = runs_of(FULL)

    assert len({run.name for run in runs}) == len(runs) >= 8
    assert len({(run.threads, run.workload, run.quotas, run.job_share, run.checkpointing) for run in runs}) >= 8
    assert all(run.workload.batch_size % run.workload.num_micro_batches == 0 for run in runs)


def test_processes_beside_each_other_have_their_own_processors_and_the_worst_status_counts(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "told.py").write_text(
        "import os, sys, pathlib\n"
        "pathlib.Path(sys.argv[1]).write_text(str(sorted(os.sched_getaffinity(0))))\n"
        "sys.exit(int(sys.argv[2]))\n"
    )
    core = min(os.sched_getaffinity(0))
    commands = {name: ["told", str(tmp_path / name), status] for name, status in (("a", "0"), ("b", "3"))}

    assert run_beside(commands, {"a": [core], "b": [core]}, minutes=1) == 3
    assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text() == f"[{core}]"


@pytest.mark.skipif(quota_refusal() is not None, reason=str(quota_refusal()))
def test_quota_holds_a_process_back_and_is_removed():
    code = (
        "import time, sys; sys.stdin.read(1)\n"
        "used, wall = time.process_time(), time.monotonic()\n"
        "while time.process_time() - used < 0.1: pass\n"
        "print((time.process_time() - used) / (time.monotonic() - wall))"
    )
    with ProcessorQuota(0.2) as quota:
        with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
            quota.take([child.pid])
            out, _ = child.communicate(b"x", timeout=30)
        folder = quota._folder
        assert float(out) < 0.6
    assert not folder.exists()
