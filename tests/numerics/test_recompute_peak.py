"""Resident memory of a process whose blocks recompute, or whose tensors lie on the heap, against the planner's bill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from edge_node.profile import probe_dtypes
from edge_node.stage.random_source import RandomSource
from edge_node.worker_process import worker_environment
from partitioner.adapter import adapter_params_of
from partitioner.memory import MemoryModel
from partitioner.model import describe_model
from partitioner.shape import JobShape
from plutino.dtypes import offered_dtypes
from plutino.families import family_of
from plutino.job.method import LoraConfig
from tests.numerics.recompute_peak import CONFIG, MICRO_BATCHES, Case

CASES = {
    "small tensors recomputed": Case(rows=1, tokens=64, checkpointing=True, keeps_heap=False),
    "small tensors kept": Case(rows=1, tokens=64, checkpointing=False, keeps_heap=False),
    "recomputed on the heap": Case(rows=2, tokens=128, checkpointing=True, keeps_heap=True),
    "recomputed and mapped": Case(rows=2, tokens=128, checkpointing=True, keeps_heap=False),
    "small tensors of many lengths in bf16": Case(
        rows=1, tokens=64, checkpointing=False, keeps_heap=False, dtype="bf16", num_lengths=20
    ),
}


def predicted_bytes(case: Case) -> int:
    source = RandomSource(CONFIG)
    table = describe_model(CONFIG, {name: source.shape(name) for name in source.names()}, family_of("llama"))
    shape = JobShape(
        dtype=case.dtype,
        batch_rows=case.rows * MICRO_BATCHES,
        micro_batch_rows=case.rows,
        row_tokens=case.tokens,
        label_tokens=max(int(rows.label_mask.sum()) for batches in case.batches() for rows in batches),
        **adapter_params_of(table, LoraConfig(rank=case.rank)).shape_fields,
    )
    items = MemoryModel(table, shape).items(
        0,
        table.num_blocks,
        num_stages=1,
        stage_index=0,
        checkpointing=case.checkpointing,
        keeps_heap=case.keeps_heap,
    )
    return sum(item.bytes for item in items)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's procfs")
@pytest.mark.timeout(180)  # another process imports torch and transformers; a busy machine takes a minute for it
@pytest.mark.parametrize("name", CASES)
def test_worker_that_recomputes_or_lies_on_the_heap_stays_within_its_bill_and_near_it(name: str) -> None:
    case = CASES[name]
    if case.dtype not in offered_dtypes(probe_dtypes()):
        pytest.skip(f"this processor has no {case.dtype} of its own")
    command = [sys.executable, "-m", "tests.numerics.recompute_peak", case.to_json()]
    environment = {**os.environ, **worker_environment(1)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=170, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]

    measured_bytes = json.loads(done.stdout.splitlines()[-1])["peak_bytes"]

    assert 0.9 <= measured_bytes / predicted_bytes(case) <= 1.0
