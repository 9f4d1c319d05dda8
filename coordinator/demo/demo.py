"""``plutino demo``: one job over three agents on this machine, each too small for the whole job.

The story in order: a coordinator; one agent with room to spare, only to measure the baseline and to ask the planner
what the whole job would need; three agents with budgets below that; the job; then, with all of it gone, the same job in
one process of transformers and peft; the comparison. Everything is a process started here and ended here.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from rich.console import Console
from rich.text import Text

from coordinator.demo.bag_of_words import BagOfWordsResult, bag_of_words
from coordinator.demo.children import Child, Children, interrupted_by_termination
from coordinator.demo.job import DEVICES, QUANTIZATION, DemoDevice, Task, job_values, reference_values, whole_job_values
from coordinator.demo.result import DemoResult, ReferenceRun, comparison
from coordinator.job_view import JobView
from coordinator.screens import follow, make_console, summary
from partitioner.plan import Plan
from plutino.assets import SNIPS_DIR
from plutino.client import Client
from plutino.data.readers import read_rows
from plutino.endpoint import ENDPOINT_FILE
from plutino.errors import ConfigError, JobError
from plutino.job.model import Scheme
from plutino.job.spec import parse_spec
from plutino.security.identity import write_private
from plutino.sizes import GIB, MIB

_START_S = 60.0
_JOIN_WITHIN_S = 3600.0
_TOKEN_FILE = "join-token"
_REFERENCE_S = 1800.0
_REFERENCE_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE"}
"""As plutino's workers have it: on a busy machine, threads that spin while they wait make a step ten times as slow."""
_PROBE_BYTES = 4 * GIB
"""Budget of the agent that measures: enough for the whole job."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoOptions:
    """What a person chooses."""

    task: Task = "intent"
    out_dir: Path
    """Receives result.json, job.yaml and adapter/."""
    engine: Literal["ray", "local"] = "ray"
    keep: bool = False
    """Keep the state folder and the logs."""
    is_fast: bool = False
    """A few steps, to see it move."""
    is_quiet: bool = False
    """Leave stdout alone: what people read goes to stderr."""
    seed: int = 0
    quantization: Scheme = QUANTIZATION
    """How the devices hold the frozen weights; the reference holds them as they are stored."""


def run_demo(options: DemoOptions) -> DemoResult:
    """Run it; no process is left, whatever happens.

    Raises:
        ConfigError: the output folder holds something that is not an earlier demo's.
        JobError: the job failed.
        PlutinoError: a process did not start or ended early; the state folder is kept then.
    """
    started_s = time.monotonic()
    console = Console(stderr=True, highlight=False) if options.is_quiet else make_console()
    out_dir = _make_room(options.out_dir)
    values = job_values(
        options.task,
        adapter_dir=out_dir / "adapter",
        seed=options.seed,
        is_fast=options.is_fast,
        quantization=options.quantization,
    )
    (out_dir / "job.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    with interrupted_by_termination(), _state_dir(options, console) as state_dir:
        view = _train(values, options, state_dir, console)
        console.print(summary(view))
        threads = min(sum(device.threads for device in DEVICES), _num_cores())
        console.rule(f"the same job in one process of transformers + peft, {threads} threads")
        reference = _run_reference(reference_values(values, threads=threads), state_dir)
    result = DemoResult.from_view(view, reference, total_s=time.monotonic() - started_s)
    (out_dir / "result.json").write_text(result.model_dump_json(indent=2) + "\n", encoding="utf-8")
    console.print(comparison(result, _bag_of_words(), task=options.task, reference_threads=threads))
    console.print(f"{result.total_seconds:.0f} s in all; numbers: {out_dir / 'result.json'}")
    return result


def _train(values: Mapping[str, Any], options: DemoOptions, state_dir: Path, console: Console) -> JobView:
    with Children(state_dir) as children:
        console.rule("a coordinator")
        arguments = ("--engine", options.engine, "--listen", "127.0.0.1:0", "--api", "127.0.0.1:0")
        command = ("-m", "coordinator.cli", "up", "--state-dir", str(state_dir), *arguments)
        children.start("coordinator", *command)
        endpoint_path = state_dir / ENDPOINT_FILE
        children.wait_for("the coordinator's start", lambda: endpoint_path.exists() or None, _START_S)
        with Client.local(state_dir) as client:
            # By token, as a person joins devices; in a file, because other users see the arguments of a process.
            token = client.members.create_token(uses=1 + len(DEVICES), ttl_s=_JOIN_WITHIN_S).token
            write_private(state_dir / _TOKEN_FILE, token.encode())
            _start_small_agents(children, client, values, state_dir, console)
            view = JobView(client.submit(parse_spec(values, base_dir=state_dir)))
            console.rule(f"job {view.job_id}")
            follow(view, client.watch(view.job_id), console)
    if view.state != "succeeded":
        raise JobError(f"the demo's job is {view.state}: {view.reason}")
    return view


def _start_small_agents(
    children: Children, client: Client, values: Mapping[str, Any], state_dir: Path, console: Console
) -> None:
    """Three agents, none of which could hold the whole job; how much that is, is measured and asked first."""
    probed = DEVICES[0]
    console.rule("what would the whole job need on one device?")
    probe = _start_agent(children, probed, _PROBE_BYTES, state_dir)
    _await_agents(children, client, {probed.name: _PROBE_BYTES})
    whole_spec = parse_spec(whole_job_values(values, probed.name), base_dir=state_dir)
    whole = Plan.model_validate(client.plan(whole_spec)).stages[0]
    children.stop(probe)
    console.print(
        f"A worker holds {_mib(whole.baseline_bytes)} MiB before any job (Python, torch, transformers: the baseline).\n"
        f"The whole job in one worker needs {_mib(whole.job_bytes)} MiB more: {_mib(whole.peak_bytes)} MiB."
    )
    console.rule(f"{len(DEVICES)} agents, each with less than that")
    budgets = {device.name: device.budget_bytes(whole.baseline_bytes, whole.job_bytes) for device in DEVICES}
    for device in DEVICES:
        _start_agent(children, device, budgets[device.name], state_dir)
        missing_bytes = whole.peak_bytes - budgets[device.name]
        console.print(
            f"  {device.name}: {_mib(budgets[device.name])} MiB, {_mib(missing_bytes)} MiB too little for that; "
            f"{device.threads} {'threads' if device.threads > 1 else 'thread'}"
        )
    _await_agents(children, client, budgets)
    if len({device.threads for device in DEVICES}) > 1:
        console.print(Text("Threads differ, so moving a block may change the last bit of a product.", style="dim"))


def _start_agent(children: Children, device: DemoDevice, budget_bytes: int, state_dir: Path) -> Child:
    return children.start(
        f"agent-{device.name}",
        *("-m", "edge_node.cli", "join"),
        *("--token-file", str(state_dir / _TOKEN_FILE)),
        *("--name", device.name),
        *("--memory", f"{budget_bytes}B"),
        *("--threads", str(device.threads)),
        *("--state-dir", str(state_dir / "agents" / device.name)),
    )


def _await_agents(children: Children, client: Client, budgets_bytes: Mapping[str, int]) -> None:
    def all_in() -> bool | None:
        alive = {d["name"]: d["memory_budget_bytes"] for d in client.devices() if d["state"] == "alive"}
        return all(alive.get(name) == budget_bytes for name, budget_bytes in budgets_bytes.items()) or None

    children.wait_for("the agents' joining", all_in, _START_S)


def _run_reference(values: Mapping[str, Any], state_dir: Path) -> ReferenceRun:
    spec_path, out_path = state_dir / "reference.yaml", state_dir / "reference.json"
    spec_path.write_text(yaml.safe_dump(dict(values)), encoding="utf-8")
    with Children(state_dir) as children:
        command = ("-m", "coordinator.demo.reference", str(spec_path), str(out_path))
        run = children.start("reference", *command, environment=_REFERENCE_ENVIRONMENT)
        children.wait_for_end(run, _REFERENCE_S)
    return ReferenceRun.from_json(out_path.read_text(encoding="utf-8"))


def _bag_of_words() -> BagOfWordsResult:
    """Words to intent, also beside the JSON task: whole JSON answers are all different, which words cannot name."""
    train, held_out = (read_rows(SNIPS_DIR / name) for name in ("train.jsonl", "validation.jsonl"))
    return bag_of_words(train.rows, held_out.rows)


def _make_room(out_dir: Path) -> Path:
    """The output folder, without the adapter of an earlier demo.

    Raises:
        ConfigError: it holds an adapter of something else.
    """
    out_dir = out_dir.resolve()
    adapter_dir, job_path = out_dir / "adapter", out_dir / "job.yaml"
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        if adapter_dir.exists():
            if not job_path.exists():
                raise ConfigError(f"{adapter_dir} exists and is no earlier demo's; choose another folder with --out")
            shutil.rmtree(adapter_dir)
    except OSError as error:
        raise ConfigError(f"cannot write to {out_dir}: {error.strerror}; choose another folder with --out") from error
    return out_dir


@contextlib.contextmanager
def _state_dir(options: DemoOptions, console: Console) -> Iterator[Path]:
    """A folder of its own for the demo's coordinator and agents; kept if wanted, or if something went wrong."""
    path = Path(tempfile.mkdtemp(prefix="plutino-demo-"))
    try:
        yield path
    except KeyboardInterrupt:
        if not options.keep:
            shutil.rmtree(path)
        raise
    except BaseException:
        console.print(f"state and logs are kept: {path}")
        raise
    if options.keep:
        console.print(f"state and logs: {path}")
    else:
        shutil.rmtree(path)


def _num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / MIB:.0f}"
