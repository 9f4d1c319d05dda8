"""Resident memory of a process that loads and trains a quantised model, against the planner's bill."""

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
from plutino.job.method import LoraConfig
from plutino.job.model import Packing
from plutino.sizes import MIB
from tests.numerics.packed_peak import MICRO_BATCHES, ROWS, TOKENS

MODEL = {
    "model_type": "llama",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "vocab_size": 4096,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}


def predicted(config: dict[str, object], scheme: str) -> dict[str, int]:
    source = RandomSource(config)
    table = describe_model(config, {name: source.shape(name) for name in source.names()}, family_of("llama"))
    shape = JobShape(
        dtype="bf16",
        packing=Packing(scheme=scheme),
        batch_rows=ROWS * MICRO_BATCHES,
        micro_batch_rows=ROWS,
        row_tokens=TOKENS,
        label_tokens=ROWS * TOKENS // 3,
        **adapter_params_of(table, LoraConfig(rank=8)).shape_fields,
    )
    blocks = {"start_block": 0, "end_block": table.num_blocks}
    items = stage_memory(table, shape, **blocks, num_stages=1, stage_index=0, checkpointing=False)
    return {item.name: item.bytes for item in items}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's procfs")
@pytest.mark.timeout(180)  # another process imports torch and transformers; a busy machine takes a minute for it
@pytest.mark.parametrize("num_blocks", [4, pytest.param(6, marks=pytest.mark.slow)])
def test_nf4_stage_stays_within_the_plans_prediction_while_loading_and_training(num_blocks):
    config = {**MODEL, "num_hidden_layers": num_blocks}
    environment = {**os.environ, **worker_environment(1)}
    command = [sys.executable, "-m", "tests.numerics.packed_peak", json.dumps(config), "nf4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=170, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    measured = json.loads(done.stdout.splitlines()[-1])

    bill = predicted(config, "nf4")

    held = bill["weights"] + bill["packed weights"]
    largest_matrix_bytes = 2 * MODEL["hidden_size"] * MODEL["intermediate_size"]
    assert measured["peak_bytes"] <= 1.1 * sum(bill.values())
    assert measured["loading_bytes"] <= held + largest_matrix_bytes + 48 * MIB
    # The same stage in bf16 would hold more in weights alone.
    assert measured["loading_bytes"] < predicted(config, "none")["weights"]
