"""The headline: from submit to saved adapter, ours beside PAC as published and what PAC was compared with.

    python -m benchmarks.pac --out DIR [--shapes t5-base,decoder-135m --agents 4 --cores-per-agent 3 --data DIR --quick]

Every contender is a job of one runtime on one emulated fleet (:mod:`benchmarks.testbed`: agents with processors of
their own, 1 Gbit links), but for two programs with peft that have no runtime of ours: transformers' own Trainer on one
device, and Ray Train on the fleet's processors, whose gradients pass loopback in place of the links. A *lane* is one
fleet's processors; contenders take their turn on them, one after the other, and with processors for several lanes
several run at once, each on its own. Figures are written after every run, and what is in DIR is not run again. PAC's
runs were of all 3,667 or 5,749 rows; here ``--samples`` of them are, and what all would take is extrapolated beside the
measured seconds and called so.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from benchmarks.cores import physical_first, pinned
from benchmarks.goals import Goal, goal_table
from benchmarks.measure import machine_facts, write_results
from benchmarks.pac_contenders import (
    OURS,
    PAC,
    RAY_TRAIN,
    TRAINER,
    Contender,
    contenders,
    job_values,
    scaling_contenders,
)
from benchmarks.pac_figures import RunFigures
from benchmarks.pac_goals import goals_of, scaling_goals, table, whole_task_s
from benchmarks.pac_ray_train import import_refusal
from benchmarks.pac_run import Order
from benchmarks.pac_shapes import SHAPES, Shape, pair_rows, write_model, write_rows
from plutino.errors import PlutinoError
from plutino.families import family_of
from plutino.job.spec import parse_spec
from plutino.state_codecs import token_bytes

SCALING = "scaling"
_QUICK = (OURS, PAC, "data-parallel: lora", f"{TRAINER}: lora", f"{RAY_TRAIN}: lora")
_OWN_CORES = 2
_LEAST_RUN_S = 30.0
_END_S = 60.0
_LOG_TAIL = 1500


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One contender on one shape."""

    shape: Shape
    contender: Contender
    is_scaling: bool = False

    @property
    def group(self) -> str:
        """What it is compared within."""
        return f"{SCALING} {self.shape.name}" if self.is_scaling else self.shape.name

    @property
    def slug(self) -> str:
        """Its files' name."""
        words = "".join(c if c.isalnum() else "-" for c in f"{self.group} {self.contender.name}")
        return "-".join(filter(None, words.split("-")))


def refusal(turn: Turn, *, has_quota: bool = False, device: str = "cpu", why_no_ray: str | None = None) -> str | None:
    """Why this contender cannot be a job, or not beside agents that share processors; None: it can.

    Args:
        turn: the contender and its model.
        has_quota: agents share processors.
        device: where all compute.
        why_no_ray: see :func:`benchmarks.pac_ray_train.import_refusal`.
    """
    if turn.contender.kind == "ray train":
        return "it is compared on processors" if device != "cpu" else why_no_ray
    if turn.contender.kind == "trainer" and has_quota:
        return "it has processors of its own, where agents share them"
    if turn.contender.kind == "trainer":
        return None if turn.contender.method["type"] in ("lora", "full") else "peft has no such method"
    here = Path("/nowhere")
    values = job_values(
        turn.contender,
        turn.shape,
        model_dir=here,
        rows_path=here / "rows.jsonl",
        out_dir=here / "out",
        devices=("one",),
        epochs=1,
        batch_size=2,
        micro_batch_size=None,
        num_stages=None,
    )
    try:
        spec = parse_spec(values, base_dir=here)
        family_of(turn.shape.family).refuse_method(spec.method.type)
    except PlutinoError as error:
        return str(error)
    return None


class Bench:
    """All turns of a call, on as many lanes as there are processors for."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._out: Path = options.out.resolve()
        self._deadline_s = time.monotonic() + 60 * options.minutes
        self._machine = machine_facts(("torch", "transformers", "peft", "grpcio", "ray"))
        self._lock = threading.Lock()
        self._failed: dict[str, dict[str, str]] = {}
        self._folders: dict[str, tuple[Path, Path]] = {}
        self._turns = [turn for turn in self._all_turns() if self._is_wanted(turn)]
        self._lanes = self._make_lanes()

    def run(self) -> int:
        """Run what has no figures yet; 0 if nothing failed."""
        waiting: queue.SimpleQueue[Turn] = queue.SimpleQueue()
        options = self._options
        why_no_ray = import_refusal() if any(turn.contender.kind == "ray train" for turn in self._turns) else None
        for turn in self._turns:
            why = refusal(turn, has_quota=options.quota is not None, device=options.device, why_no_ray=why_no_ray)
            if why is not None:
                print(f"{turn.group}, {turn.contender.name}: refused: {why}", flush=True)
                self._failed.setdefault(turn.group, {})[turn.contender.name] = f"refused: {why}"
            elif not self._figures_path(turn).is_file():
                waiting.put(turn)
        (self._out / "runs").mkdir(parents=True, exist_ok=True)
        print(f"{waiting.qsize()} runs on {len(self._lanes)} lanes of {len(self._lanes[0])} processors", flush=True)
        with tempfile.TemporaryDirectory(prefix="plutino-pac-models-", dir=self._options.scratch) as scratch:
            lanes = [
                threading.Thread(target=self._work, args=(waiting, lane, Path(scratch)), daemon=True)
                for lane in self._lanes
            ]
            for lane in lanes:
                lane.start()
            for lane in lanes:
                lane.join()
        self._write()
        self._show()
        failed = [why for of_group in self._failed.values() for why in of_group.values()]
        return 1 if any(not why.startswith("refused") for why in failed) else 0

    def _all_turns(self) -> list[Turn]:
        options = self._options
        shapes = [SHAPES[name] for name in options.shapes.split(",") if name]
        turns = []
        for shape in shapes:
            found = contenders(shape, num_agents=options.agents, codec=options.codec)
            ours = Turn(shape=shape, contender=found[0])
            # Without ours there is nothing to compare the others with.
            turns += [ours] if refusal(ours) else [Turn(shape=shape, contender=each) for each in found]
        if options.scaling:
            scaled = SHAPES[options.scaling]
            turns += [Turn(shape=scaled, contender=each, is_scaling=True) for each in scaling_contenders(options.codec)]
        return turns

    def _is_wanted(self, turn: Turn) -> bool:
        only = [name.strip() for name in self._options.only.split(";") if name.strip()]
        return not only or turn.is_scaling or turn.contender.name in only

    def _make_lanes(self) -> list[list[int]]:
        options = self._options
        ordered = physical_first(sorted(os.sched_getaffinity(0)))[: options.workers]
        largest = max(sum(each.threads or ()) for each in scaling_contenders()) if options.scaling else 0
        size = min(len(ordered), max(options.agents * options.cores_per_agent, largest) + _OWN_CORES)
        return [ordered[first : first + size] for first in range(0, len(ordered) - size + 1, size)]

    def _work(self, waiting: queue.SimpleQueue[Turn], lane: Sequence[int], scratch: Path) -> None:
        with pinned(lane):
            while True:
                try:
                    turn = waiting.get_nowait()
                except queue.Empty:
                    return
                why = self._take(turn, lane, scratch)
                with self._lock:
                    if why is not None:
                        self._failed.setdefault(turn.group, {})[turn.contender.name] = why
                    self._write()
                print(f"{turn.group}, {turn.contender.name}: {why or 'done'}", flush=True)

    def _take(self, turn: Turn, lane: Sequence[int], scratch: Path) -> str | None:
        """Run one; gives why there are no figures."""
        if (left_s := self._deadline_s - time.monotonic()) < _LEAST_RUN_S:
            return f"not begun: the {self._options.minutes:g} minutes were over"
        model_dir, rows_path = self._written(turn.shape, scratch)
        options, path = self._options, self._figures_path(turn)
        order = Order(
            shape=turn.shape.name,
            contender=turn.contender.name,
            is_scaling=turn.is_scaling,
            model_dir=str(model_dir),
            rows_path=str(rows_path),
            out=str(path),
            cores=tuple(lane),
            num_agents=options.agents,
            cores_per_agent=options.cores_per_agent,
            memory=options.memory,
            rate=options.rate,
            latency_ms=options.latency_ms,
            epochs=options.epochs,
            batch_size=options.batch_size,
            micro_batch_size=options.micro_batch_size,
            codec=options.codec,
            device=options.device,
            timeout_s=left_s,
            quota=options.quota,
        )
        order_path = scratch / f"{turn.slug}.json"
        order_path.write_text(order.to_json(), encoding="utf-8")
        log_path = path.with_suffix(".log")
        with log_path.open("wb") as log:
            child = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.pac_run", str(order_path)], stdout=log, stderr=log
            )
            try:
                status = child.wait(left_s)
            except subprocess.TimeoutExpired:
                _end(child)
                return f"ended after {left_s:.0f} s, because the {self._options.minutes:g} minutes were over"
        if status == 0:
            return None
        tail = log_path.read_bytes()[-_LOG_TAIL:].decode(errors="replace").strip()
        return f"ended with {status}: {tail}"

    def _written(self, shape: Shape, scratch: Path) -> tuple[Path, Path]:
        with self._lock:
            if shape.name not in self._folders:
                folder = scratch / shape.name
                folder.mkdir()
                rows = pair_rows(self._options.task, self._options.samples, self._options.data)
                model_dir = write_model(shape, folder / "model", rows)
                self._folders[shape.name] = (model_dir, write_rows(rows, folder / "rows.jsonl"))
                # Whoever ran first would compute while a gigabyte is still being written to the disk.
                os.sync()
            return self._folders[shape.name]

    def _figures_path(self, turn: Turn) -> Path:
        return self._out / "runs" / f"{turn.slug}.json"

    def _found(self) -> dict[str, dict[str, RunFigures]]:
        found: dict[str, dict[str, RunFigures]] = {}
        names = {field.name for field in fields(RunFigures)}
        for turn in self._turns:
            if (path := self._figures_path(turn)).is_file():
                values = {name: value for name, value in json.loads(path.read_text()).items() if name in names}
                tuples = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
                found.setdefault(turn.group, {})[turn.contender.name] = RunFigures(**{**values, **tuples})
        return found

    def _goals(self, group: str, runs: dict[str, RunFigures]) -> list[Goal]:
        if group.startswith(SCALING):
            return scaling_goals(runs)
        shape = SHAPES[group]
        all_of = contenders(shape, num_agents=self._options.agents)
        return goals_of(
            runs,
            shape=group,
            baselines=[each.name for each in all_of if each.kind == "baseline"],
            codec_bytes=token_bytes(self._options.codec, shape.hidden_size, 4),
            hidden_size=shape.hidden_size,
            task=self._options.task,
            batch_size=self._options.batch_size,
            num_devices=self._options.agents,
        )

    def _write(self) -> None:
        options, found = self._options, self._found()
        groups: dict[str, Any] = {}
        for group in dict.fromkeys(turn.group for turn in self._turns):
            runs = found.get(group, {})
            groups[group] = {
                "runs": {
                    name: each.to_dict()
                    | {"extrapolated_whole_task_s": whole_task_s(each, options.task, batch_size=options.batch_size)}
                    for name, each in runs.items()
                },
                "failed": self._failed.get(group, {}),
                "goals": [goal.to_dict() for goal in self._goals(group, runs)],
            }
        # Where folders lie on this machine is nobody's affair.
        settings = {
            name: value.name if isinstance(value, Path) else str(value) for name, value in vars(options).items()
        }
        write_results(
            self._out / "pac.json",
            {"machine": self._machine, "settings": settings, "lanes": self._lanes, "groups": groups},
        )

    def _show(self) -> None:
        for group, runs in self._found().items():
            print(f"\n{group}")
            print(table(runs, self._options.task, batch_size=self._options.batch_size))
            if goals := self._goals(group, runs):
                print(goal_table(goals))
        print(f"all figures: {self._out / 'pac.json'}")


def _end(child: subprocess.Popen[bytes]) -> None:
    """A run that took too long ends its own processes when it is asked to."""
    child.send_signal(signal.SIGTERM)
    try:
        child.wait(_END_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of figures; what is there is not run again")
    parser.add_argument("--shapes", default="t5-base,decoder-135m", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--scaling", default="", help="also fleets of other sizes, with this shape")
    parser.add_argument("--only", default="", help="contenders, separated by semicolons; empty: all")
    parser.add_argument("--task", choices=("mrpc", "stsb"), default="mrpc")
    parser.add_argument("--data", type=Path, help="folder with mrpc/train.jsonl and stsb/train.jsonl; none: generated")
    parser.add_argument("--samples", type=int, default=192)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--micro-batch-size", type=int, help="none: each contender's plan chooses")
    parser.add_argument("--codec", default="int4")
    parser.add_argument("--agents", type=int, default=4)
    parser.add_argument("--cores-per-agent", type=int, default=3)
    parser.add_argument("--quota", type=float, help="of a processor for each core of an agent, where there are too few")
    parser.add_argument("--memory", default="8GiB", help="of each agent")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: one agent, on the card")
    parser.add_argument("--rate", default="1Gbit")
    parser.add_argument("--latency-ms", type=float, default=0.3)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processors to use")
    parser.add_argument("--minutes", type=float, default=60.0, help="nothing is begun or waited for after these")
    parser.add_argument("--scratch", type=Path, help="where models are written; by default the temporary folder")
    parser.add_argument("--quick", action="store_true", help="tiny models, few rows: see it run, quote nothing")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and (options.agents > 1 or options.scaling or options.quota is not None):
        parser.error("--device cuda takes --agents 1, and neither --scaling nor --quota")
    if options.quick:
        options.shapes, options.samples, options.batch_size = "quick-decoder", 16, 8
        options.agents, options.cores_per_agent, options.memory = 2, 1, "2GiB"
        options.only = options.only or ";".join(_QUICK)
    return Bench(options).run()


if __name__ == "__main__":
    sys.exit(main())
