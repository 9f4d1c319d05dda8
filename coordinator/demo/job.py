"""The demo's job and its devices: pure values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from plutino.assets import SNIPS_DIR, TINY_LLAMA_DIR
from plutino.job.model import Scheme
from plutino.sizes import MIB

Task = Literal["intent", "json"]

NUM_FAST_STEPS = 10
QUANTIZATION: Scheme = "nf4"
"""How the demo's devices hold the frozen weights, unless asked otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoDevice:
    """An agent on this machine that plays a device of its own."""

    name: str
    threads: int
    budget_share: float
    """Its budget beyond the baseline, as a share of what the whole job needs beyond it; less than 1."""

    def budget_bytes(self, baseline_bytes: int, whole_job_bytes: int) -> int:
        """Bound on its workers' resident memory, in whole MiB."""
        return (baseline_bytes + int(self.budget_share * whole_job_bytes)) // MIB * MIB


DEVICES = (
    DemoDevice(name="large", threads=2, budget_share=0.95),
    DemoDevice(name="medium", threads=1, budget_share=0.85),
    DemoDevice(name="small", threads=1, budget_share=0.75),
)


def job_values(
    task: Task, *, adapter_dir: Path, seed: int, is_fast: bool, quantization: Scheme = "none"
) -> dict[str, Any]:
    """The job file's values: LoRA of rank 16 on all linear layers, fp32, 16 rows a step."""
    suffix = "" if task == "intent" else "_json"
    data: dict[str, Any] = {
        "train": str(SNIPS_DIR / f"train{suffix}.jsonl"),
        "eval": str(SNIPS_DIR / f"validation{suffix}.jsonl"),
    }
    training: dict[str, Any] = {
        "steps": 100 if task == "intent" else 300,
        "batch_size": 16,
        # Three stages share the two cores of a small machine: fewer and larger micro-batches cost less overhead there.
        "micro_batch_size": 8,
        # The best of 1e-3 to 5e-3 by one process over 300 steps: slot F1 0.25, 0.35, 0.43, 0.48.
        "lr": 3e-3 if task == "intent" else 5e-3,
        "warmup_steps": 5,
        "seed": seed,
        # What one device would need is then one number, not a choice.
        "checkpointing": "off",
    }
    if is_fast:
        data["eval_limit"] = 20
        training["steps"] = NUM_FAST_STEPS
    model = {"path": str(TINY_LLAMA_DIR), "dtype": "fp32"}
    if quantization != "none":
        model["quantization"] = quantization
    return {
        "name": f"demo-{task}",
        "model": model,
        "method": {"type": "lora", "rank": 16, "alpha": 32, "target_modules": "all-linear"},
        "data": data,
        "scoring": (
            {"metric": "exact_match", "max_new_tokens": 12}
            if task == "intent"
            else {"metric": "json_slots", "max_new_tokens": 120}
        ),
        "training": training,
        # Its devices share the cores of one machine: that one waits for another is no reason to move blocks.
        "placement": {"devices": [d.name for d in DEVICES], "stages": len(DEVICES), "replan": "never"},
        "output": {"dir": str(adapter_dir)},
    }


def whole_job_values(values: Mapping[str, Any], device_name: str) -> dict[str, Any]:
    """The same job on one device, in one stage: what is asked of the planner to learn what the whole job needs."""
    return {**values, "placement": {"devices": [device_name], "stages": 1}}


def reference_values(values: Mapping[str, Any], *, threads: int) -> dict[str, Any]:
    """The same job for one process: the whole batch at once, which is fastest there, and the base as it is stored.

    The base model is not scored again; that was done with the same weights already.
    """
    training = {key: value for key, value in values["training"].items() if key != "micro_batch_size"}
    scoring = {**values["scoring"], "before": False}
    model = {key: value for key, value in values["model"].items() if key != "quantization"}
    return {**values, "model": model, "training": training, "scoring": scoring, "placement": {"threads": threads}}
