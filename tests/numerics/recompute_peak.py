"""A child process that trains one stage, with recomputation or without, and tells its peak as JSON.

    python -m tests.numerics.recompute_peak CASE_JSON

Run as a worker is run, with the same allocator settings, so that resident memory means the same.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from edge_node.compute_device import CPU
from edge_node.engine.reference import InProcessPipeline
from edge_node.guard import keep_heap, resident_bytes
from edge_node.profile import probe_dtypes, warm_up
from edge_node.stage.random_source import RandomSource
from plutino.job.assignment import StageShape
from tests.numerics.packed_peak import forget_peak, peak_bytes
from tests.numerics.pipelines import make_rows, make_spec

CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 8,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "vocab_size": 4096,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MICRO_BATCHES, STEPS = 4, 5
"""The peak is that of the third step and of all after it: then moments, a snapshot and gradients have found places."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is trained, and how the process holds it."""

    rows: int
    tokens: int
    checkpointing: bool
    keeps_heap: bool
    rank: int = 16
    dtype: Literal["fp32", "bf16"] = "fp32"
    num_lengths: int = 1
    """Micro-batches are of so many lengths, one after the other, ``tokens`` the longest of them."""

    def batches(self) -> list[list[Any]]:
        numbers = range(STEPS * MICRO_BATCHES)
        all_rows = [make_rows(n, self.rows, num_tokens=self.tokens - n % self.num_lengths) for n in numbers]
        return [all_rows[first : first + MICRO_BATCHES] for first in range(0, len(all_rows), MICRO_BATCHES)]

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def main() -> None:
    case = Case(**json.loads(sys.argv[1]))
    torch.set_num_threads(1)
    warm_up()
    probe_dtypes()
    CPU.release()
    baseline_bytes = resident_bytes()
    forget_peak()
    if case.keeps_heap:
        keep_heap()
    spec = make_spec(Path("model"), rank=case.rank, target_modules="all-linear")
    dtype = DTYPES[case.dtype]
    source = RandomSource(CONFIG, dtype=dtype)
    stages = [StageShape(start_block=0, end_block=CONFIG["num_hidden_layers"])]
    with InProcessPipeline(
        lambda: source, spec, stages, total_steps=STEPS, dtype=dtype, checkpointing=case.checkpointing
    ) as pipeline:
        snapshot: dict[str, torch.Tensor] = {}
        for step, batches in enumerate(case.batches()):
            pipeline.train_step(step, batches, 100.0)
            pipeline.commit(step, 1.0)
            # Held during the next step, as if it were being sent.
            snapshot = {} if snapshot else pipeline.snapshot()
    print(json.dumps({"peak_bytes": peak_bytes() - baseline_bytes}))


if __name__ == "__main__":
    main()
