"""A model far larger than any of its devices: nf4 and LoRA over small agents, seconds a step and the peak of each.

    python -m benchmarks.quantized_8b --preset 8b      # 4 CPU agents of 2.5 GiB each
    python -m benchmarks.quantized_8b --preset 65b     # 8 agents of 6 GB each on one CUDA card
    python -m benchmarks.quantized_8b --quick          # the first with 4 of its 32 blocks: does it run at all
    python -m benchmarks.quantized_8b --preset small   # a tiny one

Agents and workers are the real ones, started as a person starts them. The weights are random, drawn on each device when
its worker loads (a folder with random_weights.json, see ``plutino/random_weights.py``): they are on no disk, and the
losses mean nothing but that training works. Rows use few of the words, so that there is something to learn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.contender import ContenderError
from benchmarks.job_watch import JobWatch
from benchmarks.measure import machine_facts
from benchmarks.model_folder import write_tokenizer
from benchmarks.peers.workload import END_TOKEN, Workload
from benchmarks.stack import PlutinoStack
from edge_node.stage.random_source import RandomSource
from partitioner.explain import explain
from partitioner.plan import Plan
from plutino.events import PlanMade, StepCommitted, WorkerLoaded
from plutino.job.spec import parse_spec
from plutino.random_weights import RANDOM_FILE
from plutino.sizes import GIB, MIB

_RESULTS = Path(__file__).parent / "results"
_EVENT_TIMEOUT_S = 900.0
_WORDS = 64
"""Words that rows are made of."""
_STORED_WORDS = 4096
"""Words of the tokenizer; the model's vocabulary may be larger."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """What is run."""

    name: str
    workload: Workload
    num_kv_heads: int
    num_agents: int
    budget_bytes: int
    """Of each agent: resident memory on CPUs, what torch's allocator holds on a card."""
    num_steps: int
    device: str = "cpu"
    dtype: str = "auto"
    scheme: str = "nf4"
    outer: str = "int8"
    """How embedding and head are held."""


PRESETS = {
    "8b": Preset(
        name="8b",
        workload=Workload(
            num_blocks=32,
            hidden_dim=4096,
            intermediate_dim=14336,
            num_heads=32,
            vocab_size=128256,
            seq_len_tokens=128,
            batch_size=4,
            num_micro_batches=4,
        ),
        num_kv_heads=8,
        num_agents=4,
        budget_bytes=5 * GIB // 2,
        num_steps=3,
    ),
    "65b": Preset(
        name="65b",
        workload=Workload(
            num_blocks=80,
            hidden_dim=8192,
            intermediate_dim=22016,
            num_heads=64,
            vocab_size=32000,
            seq_len_tokens=512,
            # The stages share one card, which gains little from more micro-batches in flight.
            batch_size=2,
            num_micro_batches=2,
        ),
        num_kv_heads=64,
        num_agents=8,
        budget_bytes=6_000_000_000,
        num_steps=20,
        device="cuda",
        dtype="bf16",
    ),
    "small": Preset(
        name="small",
        workload=Workload(
            num_blocks=4,
            hidden_dim=256,
            intermediate_dim=512,
            num_heads=4,
            vocab_size=4096,
            seq_len_tokens=64,
            batch_size=4,
            num_micro_batches=2,
        ),
        num_kv_heads=2,
        num_agents=2,
        budget_bytes=GIB,
        num_steps=3,
    ),
}


def main() -> int:
    """Run a preset; tells its figures and writes them to a file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="8b")
    parser.add_argument("--device", help="cpu or cuda[:N]; by default the preset's")
    parser.add_argument("--steps", type=int, help="by default the preset's")
    parser.add_argument("--agents", type=int, help="by default the preset's")
    parser.add_argument("--quick", action="store_true", help="one block an agent")
    parser.add_argument("--out", type=Path, help="by default benchmarks/results/quantized_<preset>.json")
    arguments = parser.parse_args()
    preset = PRESETS[arguments.preset]
    preset = replace(preset, device=arguments.device or preset.device, num_steps=arguments.steps or preset.num_steps)
    if arguments.agents is not None:
        preset = replace(preset, num_agents=arguments.agents)
    if arguments.quick:
        blocks = replace(preset.workload, num_blocks=preset.num_agents)
        preset = replace(preset, name=f"{preset.name}_quick", workload=blocks)
    out: Path = arguments.out or _RESULTS / f"quantized_{preset.name}.json"
    with tempfile.TemporaryDirectory(prefix="plutino-bench-") as folder:
        figures = run(preset, Path(folder))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(f"written to {out}", file=sys.stderr)
    return 0


def run(preset: Preset, folder: Path) -> dict[str, Any]:
    """Start everything, train, end everything.

    Raises:
        ContenderError: the job fails or stops telling.
        PlutinoError: a process does not start, or the job does not fit.
    """
    values = write_job(preset, folder)
    budgets = {f"device{index}": preset.budget_bytes for index in range(preset.num_agents)}
    started_s = time.monotonic()
    state_dir = folder / "state"
    state_dir.mkdir()
    with PlutinoStack(state_dir) as stack:
        stack.start_agents(budgets, device=preset.device)
        spec = parse_spec(values, base_dir=folder)
        try:
            # Not asked for the plan before: measuring blocks of this size may outlast a call.
            job_id = stack.client.submit(spec)
            watch = JobWatch(stack.client, job_id)
            plan, loaded, steps = _collect(watch, preset)
            stack.client.cancel(job_id)
            watch.join()
        except ContenderError as error:
            raise ContenderError(f"{error}\n{stack.logs()}") from error
    return _document(preset, plan, loaded, steps, total_s=time.monotonic() - started_s)


def _collect(watch: JobWatch, preset: Preset) -> tuple[Plan, dict[str, WorkerLoaded], list[StepCommitted]]:
    plan: Plan | None = None
    loaded: dict[str, WorkerLoaded] = {}
    steps: list[StepCommitted] = []
    while len(steps) < preset.num_steps:
        event = watch.next(_EVENT_TIMEOUT_S)
        if isinstance(event, PlanMade):
            plan = Plan.model_validate_json(event.plan_json)
            print(explain(plan), file=sys.stderr, flush=True)
        elif isinstance(event, WorkerLoaded):
            loaded[event.worker.device_name] = event
            print(
                f"{event.worker.device_name}: loaded in {event.seconds:.0f} s, {event.rss_bytes / MIB:.0f} MiB",
                file=sys.stderr,
            )
        elif isinstance(event, StepCommitted):
            steps.append(event)
            print(f"step {event.step}: loss {event.loss:.4f}, {event.seconds:.2f} s", file=sys.stderr)
        elif event is None:
            raise ContenderError(f"the job ended after {len(steps)} of {preset.num_steps} steps")
    assert plan is not None, "steps come after a plan"
    return plan, loaded, steps


def write_job(preset: Preset, folder: Path) -> dict[str, Any]:
    """The model's folder without weights, rows, and the job's values."""
    work = preset.workload
    model_dir, rows_path = folder / "model", folder / "rows.jsonl"
    model_dir.mkdir()
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": work.hidden_dim,
        "intermediate_size": work.intermediate_dim,
        "num_hidden_layers": work.num_blocks,
        "num_attention_heads": work.num_heads,
        "num_key_value_heads": preset.num_kv_heads,
        "vocab_size": work.vocab_size,
        "max_position_embeddings": work.seq_len_tokens,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": END_TOKEN,
        "pad_token_id": END_TOKEN,
    }
    (model_dir / "config.json").write_text(json.dumps(config, indent=1))
    shapes = RandomSource(config)
    drawn = {"seed": work.seed, "dtype": "BF16", "shapes": {name: shapes.shape(name) for name in shapes.names()}}
    (model_dir / RANDOM_FILE).write_text(json.dumps(drawn))
    write_tokenizer(replace(work, vocab_size=min(work.vocab_size, _STORED_WORDS)), model_dir)
    rows_path.write_text("".join(json.dumps(row) + "\n" for row in _rows(preset)))
    return {
        "name": f"quantised-{preset.name}",
        "model": {
            "path": str(model_dir),
            "dtype": preset.dtype,
            "quantization": preset.scheme,
            "quantize_embedding": preset.outer,
            "quantize_head": preset.outer,
        },
        "method": {"type": "lora", "rank": work.lora_rank, "alpha": 2 * work.lora_rank},
        "objective": {"type": "sft", "train_on": "all"},
        "data": {"train": str(rows_path), "max_tokens": work.seq_len_tokens},
        # Some steps more than are looked at: the job is cancelled before it would export what nobody wants.
        "training": {
            "steps": preset.num_steps + 5,
            "batch_size": work.batch_size,
            "micro_batch_size": work.batch_size // work.num_micro_batches,
            "lr": work.lr,
            "lr_schedule": "constant",
        },
        "placement": {"stages": preset.num_agents},
    }


def _rows(preset: Preset) -> list[dict[str, str]]:
    work = preset.workload
    generator = torch.Generator().manual_seed(work.seed)
    shape = (work.batch_size * (preset.num_steps + 5), work.seq_len_tokens - 1)
    ids = torch.randint(END_TOKEN + 1, _WORDS, shape, generator=generator).tolist()
    rows = []
    for row in ids:
        prompt, *completion = (f"t{token}" for token in row)
        rows.append({"prompt": prompt, "completion": "".join(f" {word}" for word in completion)})
    return rows


def _document(
    preset: Preset, plan: Plan, loaded: dict[str, WorkerLoaded], steps: list[StepCommitted], *, total_s: float
) -> dict[str, Any]:
    peaks: dict[str, int] = {name: event.rss_bytes for name, event in loaded.items()}
    for step in steps:
        for times in step.workers:
            # On a card the vote tells what torch's allocator holds, which only grows; else the kernel keeps a peak.
            told = times.rss_bytes if preset.device != "cpu" else max(times.rss_bytes, times.peak_rss_bytes)
            peaks[times.worker.device_name] = max(peaks.get(times.worker.device_name, 0), told)
    predicted = {stage.device_names[0]: stage.peak_bytes for stage in plan.stages}
    seconds = [step.seconds for step in steps]
    machine = machine_facts(("torch", "transformers", "peft", "bitsandbytes"))
    if preset.device != "cpu":
        machine["card"] = torch.cuda.get_device_name()
    return {
        "machine": machine,
        "preset": asdict(preset),
        "unpacked_share": plan.unpacked_share,
        "losses": [step.loss for step in steps],
        "step_s": seconds,
        "median_step_s": statistics.median(seconds),
        "predicted_step_s": plan.step_s,
        "load_s": {name: event.seconds for name, event in sorted(loaded.items())},
        "total_s": total_s,
        "agents": {
            name: {
                "peak_bytes": peaks[name],
                "predicted_peak_bytes": predicted[name],
                "budget_bytes": preset.budget_bytes,
            }
            for name in sorted(peaks)
        },
    }


if __name__ == "__main__":
    raise SystemExit(main())
