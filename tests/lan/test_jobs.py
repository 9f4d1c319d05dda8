"""The demo's job by three agents on three hosts, joined by token, over cables of 1 Gbit/s and of 100 Mbit/s."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from coordinator.demo.job import DEVICES, job_values
from tests.e2e.stack import wait_until
from tests.lan.network import Lan

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

REPOSITORY_DIR = Path(__file__).resolve().parents[2]
PLUTINO = (sys.executable, "-m", "coordinator.cli")
NODE = (sys.executable, "-m", "edge_node.cli")
WITHOUT_RIGHTS = ("unshare", "--user", "--map-user=65534", "--map-group=65534")
"""Agents run as nobody, without any of root's rights; only the LAN itself needs them."""
NAMES = tuple(device.name for device in DEVICES)
NUM_STEPS = 6
START_S = 120.0
COMMAND_S = 240.0


@dataclass
class Site:
    """A coordinator on host 0 and devices on the others, each with its own processes and folders."""

    lan: Lan
    folder: Path
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def state_dir(self) -> Path:
        return self.folder / "coordinator"

    def start(self, host: int, name: str, *command: str) -> subprocess.Popen[str]:
        with (self.folder / f"{name}.log").open("w") as log:
            process = subprocess.Popen(
                self.lan.command(host, command),
                cwd=REPOSITORY_DIR,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
        self.processes.append(process)
        return process

    def ask(self, *arguments: str) -> Any:
        """A person's command on the coordinator's host: the last JSON document that it prints."""
        command = [*PLUTINO, *arguments, "--state-dir", str(self.state_dir), "--json"]
        ended = subprocess.run(
            self.lan.command(0, command), cwd=REPOSITORY_DIR, capture_output=True, text=True, timeout=COMMAND_S
        )
        assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr + self.logs()
        return json.loads(ended.stdout.splitlines()[-1])

    def examine(self, host: int) -> dict[str, dict[str, str]]:
        """What the doctor of a device finds, by name; its agent goes on meanwhile."""
        name = NAMES[host - 1]
        command = [*WITHOUT_RIGHTS, *NODE, "doctor", "--state-dir", str(self.folder / name), "--threads", "1", "--json"]
        ended = subprocess.run(
            self.lan.command(host, command), cwd=REPOSITORY_DIR, capture_output=True, text=True, timeout=COMMAND_S
        )
        return {one["name"]: one for one in json.loads(ended.stdout)["findings"]}

    def up(self) -> None:
        """Coordinator first; then three devices join with one token of three uses."""
        listen = ("--listen", "0.0.0.0:7420", "--advertise", self.lan.address(0))
        options = ("--engine", "local", "--state-dir", str(self.state_dir), "--json")
        coordinator = self.start(0, "coordinator", *PLUTINO, "up", *listen, *options)
        assert coordinator.stdout is not None
        assert coordinator.stdout.readline(), self.logs()
        token = self.ask("token", "create", "--uses", str(len(NAMES)))["token"]
        token_file = self.folder / "token"
        token_file.write_text(token)
        for host, name in enumerate(NAMES, start=1):
            gives = ("--memory", "700MiB", "--threads", "1", "--name", name)
            folder = ("--state-dir", str(self.folder / name), "--token-file", str(token_file))
            self.start(host, name, *WITHOUT_RIGHTS, *NODE, "join", *gives, *folder)
        logs = [self.folder / f"{name}.log" for name in NAMES]
        wait_until(lambda: all("attached to" in log.read_text() for log in logs), START_S)

    def logs(self) -> str:
        """What the processes said, for a failure's message."""
        return "".join(f"\n--- {log.name}\n{log.read_text()[-1500:]}" for log in sorted(self.folder.glob("*.log")))

    def close(self) -> None:
        for process in reversed(self.processes):
            process.terminate()
        for process in reversed(self.processes):
            try:
                process.communicate(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate(timeout=10)


@pytest.fixture
def site(lan, tmp_path: Path) -> Iterator[Any]:
    @contextmanager
    def build(rate_mbit: float) -> Iterator[Site]:
        folder = tmp_path / f"{rate_mbit:g}"
        folder.mkdir()
        site = Site(lan(len(NAMES) + 1, rate_mbit=rate_mbit), folder)
        try:
            site.up()
            yield site
        finally:
            site.close()

    return build


def demo_job(folder: Path) -> Path:
    """The demo's job, three stages on its three devices, with fewer steps and no scoring."""
    values = job_values("intent", adapter_dir=folder / "adapter", seed=0, is_fast=False)
    values["training"] |= {"steps": NUM_STEPS, "warmup_steps": 1}
    values["data"] |= {"limit": 64}
    values.pop("scoring", None)
    values["data"].pop("eval", None)
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_demos_job_over_a_lan_gives_the_same_adapter_at_any_rate(site):
    adapters, losses = {}, {}
    for rate_mbit in (1000, 100):
        with site(rate_mbit) as running:
            job_id = running.ask("submit", str(demo_job(running.folder)), "--detach")["job_id"]
            running.ask("watch", job_id)
            job = running.ask("show", job_id)
            sent = {name: running.lan.sent_bytes(host) for host, name in enumerate(NAMES, start=1)}
            coordinator = {one["name"]: one for one in running.ask("doctor", "--engine", "local")["findings"]}
            device = running.examine(1)
        stages = job["detail"]["plan"]["stages"]
        assert sorted(name for stage in stages for name in stage["device_names"]) == sorted(NAMES)
        losses[rate_mbit] = [row["loss"] for row in job["detail"]["ledger"]]
        adapters[rate_mbit] = (running.folder / "adapter" / "adapter_model.safetensors").read_bytes()
        # Hidden states really went over the cables.
        assert min(sent.values()) > 100_000, sent
        assert coordinator["data plane"]["verdict"] == "ok", coordinator["data plane"]
        assert "all 6 directions" in coordinator["data plane"]["measured"]
        for name in ("control port", "bulk port", "clock"):
            assert device[name]["verdict"] == "ok", device[name]
        # A warning, because hosts of this LAN are one machine, and the doctor knows.
        assert all(f"{name} in " in device["data plane"]["measured"] for name in NAMES[1:]), device["data plane"]

    assert len(losses[1000]) == NUM_STEPS
    assert losses[1000] == losses[100]
    assert adapters[1000] == adapters[100]
