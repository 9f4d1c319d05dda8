"""A whole installation on this machine, driven as a person drives it: by command lines."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import save_file
from typer.testing import CliRunner, Result

from coordinator import cli
from plutino.assets import SNIPS_DIR, TINY_LLAMA_DIR
from plutino.client import Client, JobSummary
from tests.leash import Leash

PLUTINO = (sys.executable, "-m", "coordinator.cli")
"""What ``plutino`` runs, also where the package is not installed."""
START_S = 100.0
"""For what a process does after its imports, of which each takes 4 s of processor; below the bound of a test."""
TEST_S = 180.0
"""Bound of a test that waits for processes: on a busy machine one that imports torch takes a minute to start."""


class Stack:
    """A coordinator and its agents, each a process of a session of its own, and none that outlives this one.

    Commands that ask the coordinator are run in this process, which saves the second that each takes to start.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._leash = Leash()
        self.state_dir = folder / "state"
        self.processes: dict[str, subprocess.Popen[str]] = {}

    def up(self, *options: str) -> dict[str, str]:
        """Start a coordinator on free ports; what it prints when it is ready."""
        ports = ("--listen", "127.0.0.1:0", "--api", "127.0.0.1:0")
        process = self.start("coordinator", "up", "--state-dir", str(self.state_dir), *ports, "--json", *options)
        assert process.stdout is not None
        self.endpoint: dict[str, str] = json.loads(process.stdout.readline())
        return self.endpoint

    def node(self, name: str, memory: str = "600MiB", *more: str) -> None:
        folder = ("--state-dir", str(self.folder / "nodes" / name))
        token = self._token_file()
        options = ("--name", name, "--memory", memory, "--threads", "1", *folder, *more)
        self.start(name, "node", "join", "--token-file", str(token), *options)

    def _token_file(self) -> Path:
        """A token for one device, as a person makes one."""
        path = self.folder / "join-token"
        with Client.local(self.state_dir) as client:
            path.write_text(client.members.create_token(uses=20).token)
        return path

    def start(self, name: str, *arguments: str) -> subprocess.Popen[str]:
        with (self.folder / f"{name}.log").open("a") as log:
            process = self.processes[name] = subprocess.Popen(
                [*PLUTINO, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
        self._leash.hold(process.pid)
        return process

    def run(self, *arguments: str | Path) -> Result:
        """One command to its end, its mistakes told as in a process of its own."""
        command = [*(str(argument) for argument in arguments), "--state-dir", str(self.state_dir)]
        result = CliRunner().invoke(cli.app, command)
        if not isinstance(result.exception, (SystemExit, type(None))):
            raise result.exception
        return result

    def ask(self, *arguments: str | Path) -> Any:
        """One command's JSON."""
        ended = self.run(*arguments, "--json")
        assert ended.exit_code == 0, ended.stderr
        return json.loads(ended.stdout)

    def client(self) -> Client:
        """For looking again and again."""
        return Client.local(self.state_dir)

    def await_devices(self, *names: str) -> None:
        with self.client() as client:
            wait_until(lambda: {d["name"] for d in client.devices() if d["state"] == "alive"} >= set(names))

    def await_job(self, job_id: str, look: Callable[[JobSummary], bool]) -> JobSummary:
        """The job once ``look`` likes it."""
        with self.client() as client:
            wait_until(lambda: look(client.job(job_id).summary))
            return client.job(job_id).summary

    def logs(self) -> str:
        """The end of what every process has logged, for a test that failed."""
        paths = [*sorted(self.folder.glob("*.log")), self.state_dir / "coordinator.log"]
        return "\n".join(f"--- {path}\n{path.read_text()[-4000:]}" for path in paths if path.exists())

    def kill(self, name: str) -> None:
        """SIGKILL to an agent; its workers see its end by themselves."""
        process = self.processes.pop(name)
        process.kill()
        self._reap(process, 10)

    def close(self) -> None:
        for process in reversed(self.processes.values()):
            process.terminate()
        for process in reversed(self.processes.values()):
            try:
                self._reap(process, 15)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                self._reap(process, 10)
        self._leash.close()

    def _reap(self, process: subprocess.Popen[str], within_s: float) -> None:
        process.communicate(timeout=within_s)
        self._leash.let_go(process.pid)


def wait_until(look: Callable[[], Any], timeout_s: float = START_S) -> Any:
    """What ``look`` finds, once that is true."""
    deadline_s = time.monotonic() + timeout_s
    while not (found := look()):
        assert time.monotonic() < deadline_s, f"did not happen within {timeout_s} s"
        time.sleep(0.1)
    return found


def tiny_model(folder: Path, **config: Any) -> Path:
    """A Llama of two blocks with random weights and the bundled tokenizer."""
    shapes = _write_config(folder, config)
    random = np.random.default_rng(0)
    weights = {name: random.normal(0, 0.02, shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def hollow_model(folder: Path, **config: Any) -> Path:
    """The same with zeros that take no room on the disk: for models that are never loaded."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape in _write_config(folder, config).items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return folder


def _write_config(folder: Path, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Everything but the weights; gives their shapes."""
    shutil.copytree(TINY_LLAMA_DIR, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    values = json.loads((folder / "config.json").read_text())
    values.update({"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4})
    values.update({"num_key_value_heads": 2, "head_dim": 8, **config})
    (folder / "config.json").write_text(json.dumps(values))
    hidden, inner = values["hidden_size"], values["intermediate_size"]
    queries, keys = (values[f"num_{name}_heads"] * values["head_dim"] for name in ("attention", "key_value"))
    shapes = {"model.embed_tokens.weight": (values["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    for block in range(values["num_hidden_layers"]):
        prefix = f"model.layers.{block}"
        shapes |= {
            f"{prefix}.self_attn.q_proj.weight": (queries, hidden),
            f"{prefix}.self_attn.k_proj.weight": (keys, hidden),
            f"{prefix}.self_attn.v_proj.weight": (keys, hidden),
            f"{prefix}.self_attn.o_proj.weight": (hidden, queries),
            f"{prefix}.mlp.gate_proj.weight": (inner, hidden),
            f"{prefix}.mlp.up_proj.weight": (inner, hidden),
            f"{prefix}.mlp.down_proj.weight": (hidden, inner),
            f"{prefix}.input_layernorm.weight": (hidden,),
            f"{prefix}.post_attention_layernorm.weight": (hidden,),
        }
    return shapes


def write_job(path: Path, model_dir: Path, **parts: Any) -> Path:
    """A job file of a few small steps; ``parts`` replace its parts."""
    job = {
        "name": path.stem,
        "model": {"path": str(model_dir), "dtype": "fp32"},
        "data": {"train": str(SNIPS_DIR / "train.jsonl"), "limit": 16},
        "training": {"steps": 3, "batch_size": 4, "micro_batch_size": 2},
        **parts,
    }
    path.write_text(yaml.safe_dump(job))
    return path
