"""A child process that loads and trains a quantised model in one stage and tells its peaks as JSON.

    python -m tests.numerics.packed_peak CONFIG_JSON SCHEME

Run as a worker is run, with the same allocator settings, so that resident memory means the same.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import torch

from edge_node.engine.reference import InProcessPipeline
from edge_node.guard import release_free_memory, resident_bytes
from edge_node.profile import probe_dtypes, warm_up
from edge_node.quantize.workspace import release_workspace
from edge_node.stage.random_source import RandomSource
from plutino.job.assignment import StageShape
from plutino.job.model import Packing
from plutino.sizes import KIB
from tests.numerics.pipelines import make_rows, make_spec

ROWS, TOKENS, MICRO_BATCHES = 2, 64, 2


def main() -> None:
    config, scheme = json.loads(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    warm_up()
    probe_dtypes()
    release_workspace()
    release_free_memory()
    baseline_bytes = resident_bytes()
    forget_peak()
    spec = make_spec(Path("model"), rank=8, target_modules="all-linear")
    stages = [StageShape(start_block=0, end_block=config["num_hidden_layers"])]
    source = RandomSource(config, dtype=torch.bfloat16)
    with InProcessPipeline(
        lambda: source, spec, stages, total_steps=4, dtype=torch.bfloat16, packing=Packing(scheme=scheme)
    ) as pipeline:
        loading_bytes = peak_bytes() - baseline_bytes
        for step in range(2):
            rows = [make_rows(step * MICRO_BATCHES + m, ROWS, num_tokens=TOKENS) for m in range(MICRO_BATCHES)]
            pipeline.train_step(step, rows, 100.0)
            pipeline.commit(step, 1.0)
        peak = peak_bytes() - baseline_bytes
    print(json.dumps({"loading_bytes": loading_bytes, "peak_bytes": peak}))


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * KIB


if __name__ == "__main__":
    main()
