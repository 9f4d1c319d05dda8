"""A child process that multiplies rows of many lengths in bf16, and tells as JSON what that left in its memory.

    python -m tests.numerics.product_growth LEAST_ROWS NUM_LENGTHS

Run as a worker is run, so that its libraries keep what a worker's keep.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

WIDTH, INNER, RANK, HEADS = 128, 256, 8, 2
PRODUCTS = 14
"""Of each length, with attention's own, as ONEDNN_VERBOSE=profile_create counts them."""


def main() -> None:
    least_rows, num_lengths = map(int, sys.argv[1:])
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    weights = [drawn(WIDTH, WIDTH), drawn(INNER, WIDTH), drawn(RANK, WIDTH)]
    all_rows = drawn(least_rows + num_lengths, WIDTH)
    digest = hashlib.sha256()

    def multiply(num_rows: int) -> None:
        rows = all_rows[:num_rows]
        for weight in weights:
            product = rows @ weight.t()
            for result in (product, product @ weight, product.t() @ rows):
                digest.update(result.view(torch.uint8).numpy())
        heads = rows.view(1, num_rows, HEADS, -1).transpose(1, 2).contiguous().requires_grad_(True)
        attended = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
        attended.backward(attended.detach())
        assert heads.grad is not None
        digest.update(heads.grad.contiguous().view(torch.uint8).numpy())

    multiply(least_rows + num_lengths)
    before = _status_kib()
    for length in range(num_lengths):
        multiply(least_rows + length)
    after = _status_kib()
    grown = {name: 1024 * (after[name] - before[name]) for name in ("VmRSS", "VmData")}
    print(json.dumps({**grown, "sha256": digest.hexdigest()}))


def _status_kib() -> dict[str, int]:
    lines = (line.partition(":") for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(value.removesuffix(" kB")) for name, _, value in lines if value.endswith(" kB")}


if __name__ == "__main__":
    main()
