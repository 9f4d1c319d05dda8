"""Two cards beside torch.distributed.pipelining over NCCL: ``python -m benchmarks.scaling --cuda``.

Ours are two agents, each with a card, and every activation crosses gRPC; torch's are two processes over NCCL with the
cut that our planner chose. Weights are drawn at random on both sides, each side its own: only tokens/s are compared.
Beside them stands where our time goes: a recorded step (docs/how-a-step-works.md), in which every span waits for the
card. Figures are written after each side of each shape.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.agent_runs import NO_SHADOWS, TINY, collect
from benchmarks.contender import ChildCommand, ChildContender, ContenderError
from benchmarks.goals import Goal, goal_table
from benchmarks.job_watch import JobWatch
from benchmarks.measure import machine_facts, write_results
from benchmarks.model_folder import job_values, write_drawn_base
from benchmarks.peers.workload import Workload
from benchmarks.plutino_contender import seconds_by_stage
from benchmarks.stack import PlutinoStack
from coordinator.artifacts.traces import PlannedEpoch
from coordinator.trace_command import draw_step
from partitioner.trace import StepTrace
from plutino.errors import PlutinoError
from plutino.events import StepCommitted
from plutino.job.spec import parse_spec
from plutino.sizes import GIB
from plutino.types import JobId

LEAST_RATIO = 0.95
_NUM_CARDS = 2
_THREADS = 4
"""Of each process of both sides."""
_BUDGET_SHARE = 0.85
"""Of a card's memory; the rest is its context's and the peer's fragmentation."""
_NUM_SPARE_STEPS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A model's shape by name."""

    name: str
    workload: Workload


def _shape(name: str, num_blocks: int, hidden: int, inner: int, heads: int, vocab: int) -> Shape:
    workload = Workload(
        num_blocks=num_blocks,
        hidden_dim=hidden,
        intermediate_dim=inner,
        num_heads=heads,
        vocab_size=vocab,
        seq_len_tokens=1024,
        batch_size=16,
        num_micro_batches=8,
    )
    return Shape(name=name, workload=workload)


SHAPES = (_shape("1.1B", 22, 2048, 5632, 32, 32_000), _shape("8B", 32, 4096, 14_336, 32, 32_000))


def run_cuda(out: Path, *, quick: bool, num_steps: int, minutes: float) -> int:
    """Measure every shape and write the figures; gives the process's exit status.

    Args:
        out: the file of figures.
        quick: a tiny shape.
        num_steps: of each side, the first of which is left out.
        minutes: after which nothing is begun or waited for.

    Raises:
        SystemExit: there are not two cards.
    """
    if torch.cuda.device_count() < _NUM_CARDS:
        raise SystemExit(f"--cuda needs {_NUM_CARDS} cards, this machine has {torch.cuda.device_count()}")
    deadline_s = time.monotonic() + 60 * minutes
    shapes = (Shape(name="tiny", workload=TINY),) if quick else SHAPES
    machine = machine_facts(("torch", "transformers", "peft", "grpcio"))
    machine["cards"] = [torch.cuda.get_device_name(card) for card in range(_NUM_CARDS)]
    found: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}

    def write() -> None:
        goals = [goal.to_dict() for goal in _goals(found)]
        write_results(out, {"machine": machine, "shapes": found, "failed": failed, "goals": goals})

    for shape in shapes:
        figures = found[shape.name] = {"workload": asdict(shape.workload)}
        with tempfile.TemporaryDirectory(prefix="plutino-scaling-") as scratch:
            try:
                figures |= _plutino(shape, Path(scratch), num_steps, deadline_s)
                write()
                # One after the other, each with both cards for itself: a card that two share is what nobody has.
                figures |= _torch(shape, figures["cuts"], Path(scratch), num_steps)
            except (ContenderError, PlutinoError, OSError) as error:
                failed[shape.name] = f"{type(error).__name__}: {error}"
                print(f"{shape.name} failed: {error}", file=sys.stderr, flush=True)
        if "torch_tokens_per_s" in figures:
            figures["ratio"] = figures["plutino_tokens_per_s"] / figures["torch_tokens_per_s"]
            print(f"{shape.name}: {figures['ratio']:.3f} x torch's {figures['torch_tokens_per_s']:.0f} tokens/s")
        write()
    if goals := _goals(found):
        print(goal_table(goals))
    print(f"all figures: {out}")
    return 1 if failed else 0


def _goals(found: dict[str, dict[str, Any]]) -> list[Goal]:
    return [
        Goal(name=f"{name}: plutino / torch pipelining", measured=figures["ratio"], at_least=LEAST_RATIO)
        for name, figures in found.items()
        if "ratio" in figures
    ]


def _plutino(shape: Shape, scratch: Path, num_steps: int, deadline_s: float) -> dict[str, Any]:
    names = [f"card{card}" for card in range(_NUM_CARDS)]
    memory_bytes = torch.cuda.get_device_properties(0).total_memory
    state_dir = scratch / "state"
    state_dir.mkdir()
    written = write_drawn_base(shape.workload, scratch / "model", num_steps=num_steps + _NUM_SPARE_STEPS)
    values = job_values(shape.workload, written, dtype="bf16", shadow_every=NO_SHADOWS, num_stages=_NUM_CARDS)
    values["placement"] = {"devices": names, "stages": _NUM_CARDS, "replan": "never"}
    with PlutinoStack(state_dir) as stack:
        try:
            stack.start_agents(
                dict.fromkeys(names, min(int(_BUDGET_SHARE * memory_bytes), 120 * GIB)),
                devices={name: f"cuda:{card}" for card, name in enumerate(names)},
                threads=dict.fromkeys(names, _THREADS),
            )
            job_id = stack.client.submit(parse_spec(values, base_dir=scratch))
            watch = JobWatch(stack.client, job_id)
            plan, steps = collect(watch, num_steps, deadline_s=deadline_s)
            traced, drawn = _recorded(stack, job_id)
            stack.client.cancel(job_id)
            watch.join()
        except ContenderError as error:
            raise ContenderError(f"{error}\n{stack.logs()}") from error
    seconds = step_seconds(steps, traced)
    tokens_per_s = shape.workload.tokens_per_step / statistics.median(seconds)
    print(f"{shape.name}: {tokens_per_s:.0f} tokens/s\n{drawn}", flush=True)
    return {
        "cuts": tuple(stage.start_block for stage in plan.stages[1:]),
        "plutino_step_s": seconds,
        "plutino_tokens_per_s": tokens_per_s,
        "predicted_step_s": plan.step_s,
        "per_step_seconds": seconds_by_stage([steps]),
        "recorded_step": traced,
        "recorded_step_drawn": drawn.splitlines(),
    }


def step_seconds(steps: Sequence[StepCommitted], recorded: int | None) -> list[float]:
    """Seconds of the steps without the first, and without one in which every span waited for the card."""
    return [step.seconds for step in steps[1:] if step.step != recorded]


def _recorded(stack: PlutinoStack, job_id: JobId) -> tuple[int | None, str]:
    """The recorded step and its picture; where our time goes."""
    try:
        trace_json, planned_json = stack.client.trace(job_id)
    except PlutinoError as error:
        return None, f"no step was recorded: {error}"
    trace = StepTrace.model_validate_json(trace_json)
    planned = PlannedEpoch.model_validate_json(planned_json) if planned_json else None
    return trace.step, draw_step(trace, planned, as_picture=False)


def _torch(shape: Shape, cuts: tuple[int, ...], scratch: Path, num_steps: int) -> dict[str, Any]:
    cuts_text = ",".join(map(str, cuts))
    peer = ChildContender(
        "torch pipelining over NCCL",
        [
            ChildCommand(
                (
                    *("-m", "benchmarks.peers.torch_pipelining", shape.workload.to_json(), cuts_text),
                    *(str(rank), str(scratch / "rendezvous"), "cuda"),
                ),
                threads=_THREADS,
            )
            for rank in range(_NUM_CARDS)
        ],
    )
    try:
        peer.start()
        seconds = [figures.seconds for figures in peer.run_steps(num_steps)][1:]
    finally:
        peer.close()
    return {
        "torch_step_s": seconds,
        "torch_tokens_per_s": shape.workload.tokens_per_step / statistics.median(seconds),
    }
