"""A whole installation on this machine, driven as a person drives it: by command lines."""

from __future__ import annotations

import json
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

from plutino.assets import SNIPS_DIR, TINY_LLAMA_DIR

PLUTINO = (sys.executable, "-m", "coordinator.cli")
"""What ``plutino`` runs, also where the package is not installed."""
COMMAND_S = 60.0
START_S = 60.0


class Stack:
    """A coordinator and its agents, each a process of a session of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state_dir = folder / "state"
        self.processes: dict[str, subprocess.Popen[str]] = {}

    def up(self, *options: str) -> dict[str, str]:
        """Start a coordinator on free ports; what it prints when it is ready."""
        ports = ("--listen", "127.0.0.1:0", "--api", "127.0.0.1:0")
        process = self.start("coordinator", "up", "--state-dir", str(self.state_dir), *ports, "--json", *options)
        assert process.stdout is not None
        self.endpoint: dict[str, str] = json.loads(process.stdout.readline())
        return self.endpoint

    def node(self, name: str, memory: str = "600MiB") -> None:
        coordinator = ("--coordinator", self.endpoint["devices_address"])
        folder = ("--state-dir", str(self.folder / "nodes" / name))
        self.start(name, "node", "run", *coordinator, "--name", name, "--memory", memory, "--threads", "1", *folder)

    def start(self, name: str, *arguments: str) -> subprocess.Popen[str]:
        with (self.folder / f"{name}.log").open("a") as log:
            self.processes[name] = subprocess.Popen(
                [*PLUTINO, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
        return self.processes[name]

    def run(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """One command to its end."""
        command = [*PLUTINO, *(str(argument) for argument in arguments), "--state-dir", str(self.state_dir)]
        return subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_S, stdin=subprocess.DEVNULL)

    def ask(self, *arguments: str | Path) -> Any:
        """One command's JSON."""
        ended = self.run(*arguments, "--json")
        assert ended.returncode == 0, ended.stderr
        return json.loads(ended.stdout)

    def await_devices(self, *names: str) -> None:
        wait_until(lambda: {d["name"] for d in self.ask("devices") if d["state"] == "alive"} >= set(names))

    def kill(self, name: str) -> None:
        """SIGKILL to an agent; its workers see its end by themselves."""
        process = self.processes.pop(name)
        process.kill()
        process.communicate(timeout=10)

    def close(self) -> None:
        for process in reversed(self.processes.values()):
            process.terminate()
        for process in reversed(self.processes.values()):
            try:
                process.communicate(timeout=15)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate(timeout=10)


def wait_until(look: Callable[[], Any], timeout_s: float = START_S) -> Any:
    """What ``look`` finds, once that is true."""
    deadline_s = time.monotonic() + timeout_s
    while not (found := look()):
        assert time.monotonic() < deadline_s, f"did not happen within {timeout_s} s"
        time.sleep(0.1)
    return found


def tiny_model(folder: Path, **config: Any) -> Path:
    """A Llama of two blocks with random weights and the bundled tokenizer."""
    shutil.copytree(TINY_LLAMA_DIR, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    values = json.loads((folder / "config.json").read_text())
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    values.update({**sizes, "num_key_value_heads": 2, "head_dim": 8, **config})
    (folder / "config.json").write_text(json.dumps(values))
    shapes = {"model.embed_tokens.weight": (values["vocab_size"], 32), "model.norm.weight": (32,)}
    for block in range(2):
        prefix = f"model.layers.{block}"
        shapes |= {
            **{f"{prefix}.self_attn.{name}_proj.weight": (out, 32) for name, out in (("q", 32), ("k", 16), ("v", 16))},
            **{f"{prefix}.mlp.{name}_proj.weight": (64, 32) for name in ("gate", "up")},
            f"{prefix}.self_attn.o_proj.weight": (32, 32),
            f"{prefix}.mlp.down_proj.weight": (32, 64),
            f"{prefix}.input_layernorm.weight": (32,),
            f"{prefix}.post_attention_layernorm.weight": (32,),
        }
    random = np.random.default_rng(0)
    save_file(
        {name: random.normal(0, 0.02, shape).astype(np.float32) for name, shape in shapes.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    return folder


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
