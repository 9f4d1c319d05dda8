"""Memory and bits of a worker's bf16 products of many lengths, with few of them kept and with all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from edge_node.profile import probe_dtypes
from edge_node.worker_process import worker_environment
from partitioner.heap import FLOOR_BYTES
from partitioner.product_code import KEPT_PRODUCTS, product_code_bytes, product_code_environment, untouched_code_bytes
from plutino.dtypes import offered_dtypes
from tests.numerics.product_growth import PRODUCTS

NUM_LENGTHS = 40


def grown(environment: Mapping[str, str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.numerics.product_growth", "64", str(NUM_LENGTHS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's procfs")
@pytest.mark.timeout(120)  # two other processes import torch
def test_products_of_many_lengths_stay_within_their_bill_and_keep_their_bits() -> None:
    if "bf16" not in offered_dtypes(probe_dtypes()):
        pytest.skip("this processor has no bf16 of its own")
    environment = {**os.environ, **worker_environment(1)}

    bounded = grown(environment)
    unbounded = grown({k: v for k, v in environment.items() if k not in product_code_environment()})

    resident_bytes = product_code_bytes("bf16", is_on_cards=False) + FLOOR_BYTES
    assert bounded["VmRSS"] <= resident_bytes
    assert bounded["VmData"] <= resident_bytes + untouched_code_bytes("bf16")
    # So many products were met that the bound is what held them.
    assert NUM_LENGTHS * PRODUCTS > 4 * KEPT_PRODUCTS and unbounded["VmRSS"] > 2 * resident_bytes
    assert bounded["sha256"] == unbounded["sha256"]
