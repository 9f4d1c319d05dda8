"""Resident memory of a process that prunes by gradients and trains, against the planner's bill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from edge_node.stage.random_source import RandomSource
from edge_node.worker_process import worker_environment
from partitioner.adapter import adapter_params_of
from partitioner.memory import stage_memory
from partitioner.model import describe_model
from partitioner.shape import JobShape
from plutino.families import family_of
from tests.numerics.fisher_peak import METHOD, Case

MODEL = {
    "model_type": "llama",
    "num_hidden_layers": 4,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "vocab_size": 4096,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
WIDE = MODEL | {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_key_value_heads": 16}
CASES = {
    "many tokens": Case(config=MODEL, dtype="fp32", rows=4, tokens=128),
    "long rows": Case(config=MODEL, dtype="fp32", rows=2, tokens=512),
    "bf16": Case(config=MODEL, dtype="bf16", rows=4, tokens=128),
    "large matrices": Case(config=WIDE, dtype="fp32", rows=2, tokens=64),
    "large head": Case(config=MODEL | {"vocab_size": 32000}, dtype="fp32", rows=4, tokens=128),
}


def predicted(case: Case) -> dict[str, int]:
    source = RandomSource(case.config)
    table = describe_model(case.config, {name: source.shape(name) for name in source.names()}, family_of("llama"))
    shape = JobShape(
        dtype=case.dtype,
        batch_rows=case.rows * case.micro_batches,
        micro_batch_rows=case.rows,
        row_tokens=case.tokens,
        label_tokens=max(int(rows.label_mask.sum()) for rows in case.batches),
        **adapter_params_of(table, METHOD).shape_fields,
    )
    blocks = {"start_block": 0, "end_block": table.num_blocks}
    items = stage_memory(table, shape, **blocks, num_stages=1, stage_index=0, checkpointing=False)
    return {item.name: item.bytes for item in items}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's procfs")
@pytest.mark.timeout(180)  # another process imports torch and transformers; a busy machine takes a minute for it
@pytest.mark.parametrize("name", CASES)
def test_pass_that_prunes_by_gradients_stays_within_its_bill_and_near_it(name: str) -> None:
    case = CASES[name]
    command = [sys.executable, "-m", "tests.numerics.fisher_peak", case.to_json()]
    environment = {**os.environ, **worker_environment(1)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=170, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    measured = json.loads(done.stdout.splitlines()[-1])

    bill = predicted(case)

    assert bill["pruning"] > 0
    assert measured["whole_bytes"] > measured["training_bytes"], "the pass does not bind, so that it proves nothing"
    assert 0.85 <= measured["whole_bytes"] / sum(bill.values()) <= 1.0
