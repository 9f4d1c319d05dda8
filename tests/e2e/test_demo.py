"""``plutino demo`` as a person runs it, with few steps: minutes rather than seconds, because it compares with peft."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from tests.e2e.stack import PLUTINO, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.ray]


def test_demo_writes_what_it_measured_and_leaves_no_process(tmp_path):
    command = [*PLUTINO, "demo", "--fast", "--json", "--out", str(tmp_path / "out")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=800)

    assert ended.returncode == 0, ended.stderr
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result == json.loads(ended.stdout)
    assert list(result) == [
        "accuracy_before", "accuracy_after", "train_seconds", "total_seconds", "tokens_per_s", "losses", "adapter_dir",
        "reference", "agents",
    ]  # fmt: skip
    assert result["losses"][-1] < result["losses"][0] / 2
    assert Path(result["adapter_dir"], "adapter_model.safetensors").exists()
    assert [agent["blocks"] for agent in result["agents"]][-1][1] == 8
    for agent in result["agents"]:
        assert agent["measured_job_mb"] <= agent["predicted_job_mb"]
        assert agent["peak_rss_mb"] <= agent["budget_mb"]
    assert "bag of words" in ended.stderr


@pytest.mark.parametrize("engine", ["local", "ray"])
def test_demo_killed_leaves_no_process(tmp_path, engine):
    command = [*PLUTINO, "demo", "--fast", "--engine", engine, "--out", str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as demo:
        family = psutil.Process(demo.pid)
        # With the first agent's worker the coordinator, its bulk process and its engine are up, too.
        wait_until(lambda: any("edge_node.worker" in child.cmdline() for child in alive_below(family)), 120)
        children = alive_below(family)

        demo.kill()
        demo.wait(10)

    assert len(children) >= 4
    _, alive = psutil.wait_procs(children, timeout=60)
    assert alive == []


def alive_below(process: psutil.Process) -> list[psutil.Process]:
    return [child for child in process.children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE]


def test_demo_interrupted_ends_every_process(tmp_path):
    command = [*PLUTINO, "demo", "--fast", "--engine", "local", "--out", str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as demo:
        family = psutil.Process(demo.pid)
        # The coordinator, its bulk process, the first agent and its worker.
        wait_until(lambda: len(family.children(recursive=True)) >= 4)
        children = family.children(recursive=True)

        demo.send_signal(signal.SIGINT)
        said, _ = demo.communicate(timeout=60)

    assert (demo.returncode, "nothing of it is left running" in said) == (130, True)
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []
