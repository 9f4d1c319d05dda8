"""A child process that starts a side network from the blocks' gradients and tells its peaks as JSON.

    python -m tests.numerics.fisher_peak CASE_JSON

Run as a worker is run, with the same allocator settings, so that resident memory means the same.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from edge_node.engine.reference import InProcessPipeline
from edge_node.guard import release_free_memory, resident_bytes
from edge_node.profile import probe_dtypes, warm_up
from edge_node.quantize.workspace import release_workspace
from edge_node.stage.random_source import RandomSource
from plutino.job.assignment import StageShape
from plutino.job.method import ParallelAdaptersConfig
from tests.numerics.packed_peak import forget_peak, peak_bytes
from tests.numerics.pipelines import make_rows, make_spec

METHOD = ParallelAdaptersConfig(reduction=8, init="fisher")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model in one stage, and what is sent through it."""

    config: dict[str, Any]
    dtype: Literal["fp32", "bf16"]
    rows: int
    tokens: int
    micro_batches: int = 2

    @property
    def batches(self) -> list[Any]:
        return [make_rows(m, self.rows, num_tokens=self.tokens) for m in range(self.micro_batches)]

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def main() -> None:
    case = Case(**json.loads(sys.argv[1]))
    torch.set_num_threads(1)
    warm_up()
    probe_dtypes()
    release_workspace()
    release_free_memory()
    baseline_bytes = resident_bytes()
    spec = make_spec(Path("model")).model_copy(update={"method": METHOD})
    stages = [StageShape(start_block=0, end_block=case.config["num_hidden_layers"])]
    dtype = DTYPES[case.dtype]
    source = RandomSource(case.config, dtype=dtype)
    with InProcessPipeline(lambda: source, spec, stages, total_steps=4, dtype=dtype) as pipeline:
        rows = case.batches
        forget_peak()
        pipeline.train_step(0, rows, 100.0)
        whole_bytes = peak_bytes() - baseline_bytes
        pipeline.commit(0, 1.0)
        forget_peak()
        pipeline.train_step(1, rows, 100.0)
        training_bytes = peak_bytes() - baseline_bytes
    print(json.dumps({"whole_bytes": whole_bytes, "training_bytes": training_bytes}))


if __name__ == "__main__":
    main()
