"""Two cards beside torch.distributed.pipelining over NCCL: ``python -m benchmarks.scaling --cuda``.

Ours are two agents, each with a card, and every activation crosses gRPC; torch's are two processes over NCCL with the
cut that our planner chose. Weights are drawn at random on both sides, each side its own: only tokens/s are compared.
"""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.contender import ChildCommand, ChildContender
from benchmarks.goals import Goal, goal_table
from benchmarks.job_watch import JobWatch
from benchmarks.measure import machine_facts, write_results
from benchmarks.model_folder import job_values, write_drawn_base
from benchmarks.peers.workload import Workload
from benchmarks.plutino_contender import seconds_by_stage
from benchmarks.scaling import NO_SHADOWS, TINY, collect
from benchmarks.stack import PlutinoStack
from plutino.job.spec import parse_spec
from plutino.sizes import GIB

LEAST_RATIO = 0.95
_NUM_CARDS = 2
_BUDGET_SHARE = 0.85
"""Of a card's memory; the rest is its context's and the peer's fragmentation."""


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


def run_cuda(out: Path, *, quick: bool, num_steps: int) -> int:
    """Measure every shape and write the figures.

    Raises:
        SystemExit: there are not two cards.
        ContenderError: a process failed or stopped telling.
        PlutinoError: a process does not start, or the job does not fit.
    """
    if torch.cuda.device_count() < _NUM_CARDS:
        raise SystemExit(f"--cuda needs {_NUM_CARDS} cards, this machine has {torch.cuda.device_count()}")
    shapes = (Shape(name="tiny", workload=TINY),) if quick else SHAPES
    found: dict[str, dict[str, Any]] = {}
    for shape in shapes:
        with tempfile.TemporaryDirectory(prefix="plutino-scaling-") as scratch:
            found[shape.name] = _compare(shape, Path(scratch), num_steps)
    goals = [
        Goal(name=f"{name}: plutino / torch pipelining", measured=figures["ratio"], at_least=LEAST_RATIO)
        for name, figures in found.items()
    ]
    print(goal_table(goals))
    machine = machine_facts(("torch", "transformers", "peft", "grpcio"))
    machine["cards"] = [torch.cuda.get_device_name(card) for card in range(_NUM_CARDS)]
    write_results(out, {"machine": machine, "shapes": found, "goals": [goal.to_dict() for goal in goals]})
    print(f"all figures: {out}")
    return 0


def _compare(shape: Shape, scratch: Path, num_steps: int) -> dict[str, Any]:
    cuts, ours_s, by_stage, predicted_s = _plutino(shape, scratch, num_steps)
    # One after the other, each with both cards for itself: a card that two share is not what anybody has.
    theirs_s = _torch(shape, cuts, scratch, num_steps)
    tokens = shape.workload.tokens_per_step
    figures = {
        "workload": asdict(shape.workload),
        "cuts": cuts,
        "plutino_step_s": ours_s,
        "torch_step_s": theirs_s,
        "plutino_tokens_per_s": tokens / statistics.median(ours_s),
        "torch_tokens_per_s": tokens / statistics.median(theirs_s),
        "ratio": statistics.median(theirs_s) / statistics.median(ours_s),
        "predicted_step_s": predicted_s,
        "per_step_seconds": by_stage,
    }
    print(f"{shape.name}: {figures['plutino_tokens_per_s']:.0f} tokens/s, torch {figures['torch_tokens_per_s']:.0f}")
    return figures


def _plutino(
    shape: Shape, scratch: Path, num_steps: int
) -> tuple[tuple[int, ...], list[float], list[dict[str, float]], float]:
    names = [f"card{card}" for card in range(_NUM_CARDS)]
    memory_bytes = torch.cuda.get_device_properties(0).total_memory
    state_dir = scratch / "state"
    state_dir.mkdir()
    written = write_drawn_base(shape.workload, scratch / "model", num_steps=num_steps + 4)
    values = job_values(shape.workload, written, dtype="bf16", shadow_every=NO_SHADOWS, num_stages=_NUM_CARDS)
    values["placement"] = {"devices": names, "stages": _NUM_CARDS}
    with PlutinoStack(state_dir) as stack:
        budgets = dict.fromkeys(names, min(int(_BUDGET_SHARE * memory_bytes), 120 * GIB))
        stack.start_agents(budgets, devices={name: f"cuda:{card}" for card, name in enumerate(names)})
        job_id = stack.client.submit(parse_spec(values, base_dir=scratch))
        watch = JobWatch(stack.client, job_id)
        plan, steps = collect(watch, num_steps)
        stack.client.cancel(job_id)
        watch.join()
    cuts = tuple(stage.start_block for stage in plan.stages[1:])
    return cuts, [step.seconds for step in steps[1:]], seconds_by_stage([steps]), plan.step_s


def _torch(shape: Shape, cuts: tuple[int, ...], scratch: Path, num_steps: int) -> list[float]:
    cuts_text = ",".join(map(str, cuts))
    peer = ChildContender(
        "torch pipelining over NCCL",
        [
            ChildCommand(
                (
                    *("-m", "benchmarks.peers.torch_pipelining", shape.workload.to_json(), cuts_text),
                    *(str(rank), str(scratch / "rendezvous"), "cuda"),
                ),
                threads=4,
            )
            for rank in range(_NUM_CARDS)
        ],
    )
    try:
        peer.start()
        return [figures.seconds for figures in peer.run_steps(num_steps)][1:]
    finally:
        peer.close()
